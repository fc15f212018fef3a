"""What a run would do: units, window, bytes and plan of a module that nothing has run of yet."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from humanize import naturalsize
from torch import nn

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.choices import memory_need, wire_of
from lightning_superpipe.host_memory import files_for, stored_kinds, unit_sizes
from lightning_superpipe.partition import UnitTable, partition, unit_table
from lightning_superpipe.planning.actions import Op, Plan
from lightning_superpipe.planning.budget import MemoryNeed, choose_k
from lightning_superpipe.planning.disk_tier import FileChoice
from lightning_superpipe.planning.disk_work import DiskWork, StoredUnit, disk_work
from lightning_superpipe.planning.lower import forward_keep, lower_window
from lightning_superpipe.planning.order import forward_order, training_order

__all__ = ["Preview", "predicted_peak_bytes", "preview"]

_WIDTH = 120
_STATES = 2  # of AdamW, each as large as its parameter


@dataclass(frozen=True)
class Preview:
    """What streaming a module would mean; ``print`` it.

    Attributes:
        units: units and anchors, with their bytes.
        k: most units on the device at once, as chosen.
        k_prime: units moved per transfer.
        training: plan of a training step over the units in order of registration.
        inference: plan of a forward pass that is repeated.
        peak_bytes: device bytes known before the first step; activations come on top.
        disk: what a training step with AdamW, all weights trained, moves between files and memory; None without files.
        files: what the options leave open about files; None without files.
        endurance_tb: what may be written in the drive's life, 10^12 bytes; None if not known.
        has_activations_in_files: they go there, as far as they are offloaded; their bytes are not known here.
    """

    units: UnitTable
    k: int
    k_prime: int
    training: Plan
    inference: Plan
    peak_bytes: int
    disk: DiskWork | None = None
    files: FileChoice | None = None
    endurance_tb: float | None = None
    has_activations_in_files: bool = False

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied to the device in a training step."""
        return _h2d_bytes(self.training, self.units)

    def __str__(self) -> str:
        """Return everything as text."""
        return "\n\n".join([str(self.units), self._window(), *self._wear(), *self._plans()])

    def _wear(self) -> list[str]:
        """Return what files cost, if there are any."""
        if self.disk is None or self.files is None:
            return []
        num_units = sum(row.role == "unit" for row in self.units)
        others = "; activations that go there come on top" if self.has_activations_in_files else ""
        wear = self.disk.wear(self.endurance_tb)
        return [f"Files: {self.disk}, trained with AdamW{others}: {wear}; {self.files.describe(num_units)}."]

    def _window(self) -> str:
        slots = self.k * self.units.largest.num_bytes
        stay = self.units.anchor_bytes + self.units.buffer_bytes
        return (
            f"Window: k={self.k}, k_prime={self.k_prime}. On the device before activations: {_size(self.peak_bytes)} "
            f"({_size(slots)} of slots, {_size(stay)} of anchors and buffers, "
            f"{_size(self.peak_bytes - slots - stay)} for gradients on their way home)."
        )

    def _plans(self) -> list[str]:
        """Return both plans, wrapped; units are numbered from 0 in the order of the table."""
        known = (("A training step", self.training), ("A forward pass, repeated", self.inference))
        return [
            f"{name}: {plan.num_loads} loads, {_size(_h2d_bytes(plan, self.units))} to the device\n"
            + textwrap.fill(str(plan), _WIDTH, initial_indent="  ", subsequent_indent="  ")
            for name, plan in known
        ]


def preview(module: nn.Module, config: SuperpipeConfig) -> Preview:
    """Return what streaming the module would mean; nothing of it runs, and it may be on the meta device.

    Raises:
        PartitionError, UnsupportedError: the module cannot be streamed, or not as asked.
        BudgetError: the window does not fit ``device_memory``.
    """
    found = partition(module, config.units, is_abstract=True)
    need = memory_need(module, found, wire_of(module, config), trains=True)
    budget = config.device_memory if isinstance(config.device_memory, int) else None
    asked = config.k_prime if isinstance(config.k_prime, int) else 1
    k = choose_k(config.k if isinstance(config.k, int) else None, need, budget, k_prime=asked)
    k_prime = min(asked, k)
    units = unit_table(module, found, k=k)
    num_units = sum(row.role == "unit" for row in units)
    forward = forward_order(num_units)
    keep = forward_keep(forward, k, k_prime)
    first = lower_window(forward, k=k, k_prime=k_prime, keep=keep, cyclic=True)
    files = files_for(module, [], config, need, wire_of(module, config), units)
    training = lower_window(training_order(num_units), k=k, k_prime=k_prime)
    return Preview(
        units=units,
        k=k,
        k_prime=k_prime,
        training=training,
        inference=lower_window(forward, k=k, k_prime=k_prime, resident=first.final_resident, keep=keep, cyclic=True),
        peak_bytes=predicted_peak_bytes(units, k),
        disk=_disk_work(config, units, training, files),
        files=files,
        endurance_tb=config.disk_options.endurance_tb,
        has_activations_in_files=config.is_on_disk("activations"),
    )


def _disk_work(config: SuperpipeConfig, units: UnitTable, plan: Plan, files: FileChoice) -> DiskWork | None:
    """What a step reads and writes, where kinds are in files."""
    kinds = stored_kinds(config)
    if not kinds:
        return None
    weights, states, gradients = (kind in kinds for kind in ("weights", "states", "gradients"))
    stored = []
    for index, size in enumerate(unit_sizes(units)):
        moved = 0 if index in files.in_memory else size
        stored.append(StoredUnit(moved * weights, _STATES * moved * states, gradient_bytes=size * gradients))
    return disk_work((action.unit for action in plan.actions if action.op is Op.PREFETCH), stored)


def predicted_peak_bytes(units: UnitTable, k: int) -> int:
    """Return the device bytes of training that are known before the first step; activations come on top."""
    need = MemoryNeed(
        slot_bytes=units.largest.num_bytes,
        largest_unit=units.largest.name,
        anchor_bytes=units.anchor_bytes + units.buffer_bytes,
        num_units=len(units),
    )
    return need.total(k)


def _h2d_bytes(plan: Plan, units: UnitTable) -> int:
    sizes = [row.num_bytes for row in units if row.role == "unit"]
    return sum(sizes[action.unit] for action in plan.actions if action.op is Op.PREFETCH)


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
