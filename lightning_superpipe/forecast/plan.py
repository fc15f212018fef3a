"""What a run will take on a machine, before it and without the machine: a table of windows, and the best of them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from humanize import naturalsize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.activations import choose_policies
from lightning_superpipe.errors import BudgetError, ConfigError
from lightning_superpipe.forecast.files import in_files
from lightning_superpipe.forecast.machine import machine_profile
from lightning_superpipe.forecast.played import MakeOptimizer, PlayedStep, Step, play
from lightning_superpipe.forecast.workload import workload_on
from lightning_superpipe.knobs import may_step_aside, most_slots
from lightning_superpipe.observe import MachineProfile, find_profile
from lightning_superpipe.observe.kernels import with_kernels
from lightning_superpipe.planning.aside import OrdinaryNeed, ordinary_need
from lightning_superpipe.planning.choose import Asked, Choice, Limits, choose, needed_bytes
from lightning_superpipe.planning.disk_work import DiskWork
from lightning_superpipe.planning.free_batch import FreeBatch, smallest_free_batch
from lightning_superpipe.planning.prediction import Prediction
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Setting, Speeds, Workload

__all__ = ["Forecast", "Window", "forecast_of", "plan", "profile_of"]

_OF_TORCH = re.compile(r"(cpu|cuda|xpu|mps|hpu)(:\d+)?")
_WINDOWS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
_WIDTH = 120
_NOT_COUNTED = (
    "Not counted: the loop, its callbacks and loggers, data, clipping, and what caches gain or lose. Small steps take "
    "longer than this; a run measures its own first steps."
)


@dataclass(frozen=True)
class Window:
    """One line of the table.

    Attributes:
        setting: all knobs.
        prediction: of a step.
        fits: with room for larger batches.
        is_chosen: it is the fastest that fits.
    """

    setting: Setting
    prediction: Prediction
    fits: bool
    is_chosen: bool


@dataclass(frozen=True)
class Forecast:
    """What a run will take; ``print`` it.

    Attributes:
        machine: the profile that it is for.
        step: what runs.
        workload: the same in seconds and bytes on that machine.
        speeds: of its link.
        limits: that a setting must keep.
        windows: for a table of (k, k').
        choice: the fastest setting that fits, with its reasons; None if none does.
        refusal: why none fits; empty if one does.
        ordinary: what the run holds without streaming, if that fits and it may go on so; None else.
        free: from which batch on copies and updates are hidden.
        recomputes: units compute their forward again in backward.
        remarks: what had to be assumed.
        endurance_tb: what may be written in the drive's life, 10^12 bytes; None if not known.
    """

    machine: MachineProfile
    step: PlayedStep
    workload: Workload
    speeds: Speeds
    limits: Limits
    windows: tuple[Window, ...]
    choice: Choice | None
    refusal: str
    ordinary: OrdinaryNeed | None
    free: FreeBatch
    recomputes: bool
    remarks: tuple[str, ...]
    endurance_tb: float | None = None

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines())

    def _lines(self) -> Iterator[str]:
        machine = self.machine
        yield f"On {machine.identity.device or machine.device}{', emulated' if machine.emulated else ''}, predicted:"
        if machine.note:
            yield f"{machine.note}: {', '.join(machine.sources)}"
        yield from _rendered(self._table())
        yield self.refusal or ("" if self.choice is None else self.choice.explain())
        if self.ordinary is not None:
            yield f"All {self.ordinary}: after its first steps a run may go on as without superpipe (step_aside)."
        host = self.step.host
        yield (
            f"Host memory: {_size(host.total)} ({_size(host.weights)} of weights, {_size(host.gradients)} of "
            f"gradients, {_size(host.states + host.masters)} of optimizer states)."
        )
        if self.choice is not None and (disk := self.choice.prediction.disk) != DiskWork():
            yield f"Files: {disk}: {disk.wear(self.endurance_tb)}."
        yield from self._free_batch()
        yield from (f"Assumed: {remark}." for remark in self.remarks)
        yield _NOT_COUNTED

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD)
        for name in ("k", "k'", "stay", "step", "samples/s", "tokens/s", "device", "activations", "waits", ""):
            table.add_column(name, justify="left" if not name else "right")
        for window in self.windows:
            setting, found = window.setting, window.prediction
            rates = [count / found.step_s for count in (self.workload.samples, self.workload.tokens)]
            table.add_row(
                str(setting.k),
                str(setting.k_prime),
                str(setting.resident),
                _time(found.step_s),
                f"{rates[0]:,.3g}",
                f"{rates[1]:,.0f}" if rates[1] else "-",
                _size(found.peak.total),
                _size(found.peak.activations),
                _time(found.stall_s),
                "<- chosen" if window.is_chosen else "" if window.fits else "does not fit",
            )
        return table

    def _free_batch(self) -> Iterator[str]:
        """The smallest batch at which streaming is free: batch x seconds of copies / seconds of compute."""
        free, batch = self.free, self.workload.samples
        if free.samples == float("inf"):
            yield "Streaming is never free here: nothing computes."
            return
        tokens = f" ({free.tokens:,.0f} tokens)" if free.tokens else ""
        yield f"Streaming is free from a batch of {free.samples:,.0f}{tokens} on: batch x copies / compute ="
        forward_s = sum(unit.forward_s for unit in self.workload.units)
        below = self.workload.units[self.workload.lowest :]
        backward_s = sum(unit.backward_s + self.recomputes * unit.forward_s for unit in below)
        parts = (
            ("loads under the forward", free.forward, forward_s),
            ("loads and gradients under the backward", free.backward, backward_s),
            ("updates under both", free.update, forward_s + backward_s),
            *((("reads and writes of files under both", free.disk, forward_s + backward_s),) if free.disk else ()),
        )
        for name, needed, compute_s in parts:
            yield f"  {batch} x {_time(needed * compute_s / batch)} / {_time(compute_s)} = {needed:.3g}, {name}"


def plan(
    module: nn.Module,
    batch: Any,
    *,
    device: MachineProfile | torch.device | str | None = None,
    config: SuperpipeConfig | None = None,
    step: Step | None = None,
    optimizer: MakeOptimizer | None = None,
    precision: str = "32-true",
    **options: Any,
) -> Forecast:
    """Predict what training a module will take, without running it.

    ::

        with torch.device("meta"):  # no memory for weights
            model = AutoModelForCausalLM.from_config(config)
        print(plan(model, {"input_ids": ids, "labels": ids}, device="rtx4090-24g"))

    Args:
        module: on any device, the meta device included; it stays as it is.
        batch: one, of real tensors.
        device: a profile, the name of one that comes with the package, a file that ``superpipe profile`` wrote, or a
            device of this machine such as ``"cuda"``; None takes this machine's own.
        config: all options at once; or give them one by one as ``options``.
        step: returns the loss of a module and a batch; None takes ``training_step``, or the module's call.
        optimizer: makes one from parameters; None takes ``configure_optimizers``, or AdamW.
        precision: of the Trainer, such as ``"bf16-mixed"``.
        options: fields of :class:`~lightning_superpipe.SuperpipeConfig`; what is left out is chosen.

    Raises:
        ConfigError: an option or the name of a machine is unknown.
        PartitionError, UnsupportedError: the module cannot be streamed, or not be played.
        SuperpipeError: the profile lacks what a prediction needs.
    """
    chosen = SuperpipeConfig.from_options(**options) if config is None else config
    profile = profile_of(device)
    played = play(module, batch, chosen, step=step, optimizer=optimizer, precision=precision)
    return forecast_of(profile, played, chosen)


def profile_of(device: MachineProfile | torch.device | str | None) -> MachineProfile:
    """Return the profile that a device of :func:`plan` means.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(device, MachineProfile):
        return device
    if device is None or isinstance(device, torch.device) or _OF_TORCH.fullmatch(device):
        return machine_profile(device)
    return find_profile(device)


def forecast_of(profile: MachineProfile, played: PlayedStep, config: SuperpipeConfig) -> Forecast:
    """Return what a played step takes on a machine."""
    remarks = played.remarks
    host = None
    if not profile.updates:
        host = machine_profile("cpu")
        remarks += (
            f"updates as fast as on this machine's host ({host.identity.cpu}, {host.identity.num_cores} cores)",
        )
    if profile.use_s == 0.0:
        remarks += ("the engine itself takes no time, and operations start at once",)
    if config.update_on_device == "auto":
        remarks += ("no unit is updated on the device: update_on_device='auto' is decided in the run",)
    speeds = profile.speeds(pinned=config.pin_memory is not False)
    limits = _limits(profile, config)
    asked = _asked(profile, played, config, has_limit=limits.device_bytes is not None)
    on_machine = workload_on(profile, played, host)
    if asked.update_on_device:
        on_machine = with_kernels(on_machine, profile, shares_memory=profile.emulated)
    found = in_files(on_machine, config, played.table, played.host, speeds)
    workload, played, remarks = found.workload, replace(played, host=found.host), remarks + found.remarks
    try:
        choice, refusal = choose(workload, speeds, limits, asked), ""
    except BudgetError as error:
        choice, refusal = None, f"It does not fit: {error}"
    recomputes = choice is not None and choice.setting.policy(0) == "recompute"
    return Forecast(
        machine=profile,
        step=played,
        workload=workload,
        speeds=speeds,
        limits=limits,
        windows=tuple(_windows(workload, speeds, limits, asked, choice)),
        choice=choice,
        refusal=refusal,
        ordinary=_ordinary(choice, played, config),
        free=smallest_free_batch(workload, speeds, recompute=recomputes),
        recomputes=recomputes,
        remarks=remarks,
        endurance_tb=config.disk_options.endurance_tb,
    )


def _ordinary(choice: Choice | None, played: PlayedStep, config: SuperpipeConfig) -> OrdinaryNeed | None:
    if choice is None or not may_step_aside(config):
        return None
    host = played.host
    return ordinary_need(choice, host.weights, host.gradients, host.states)


def _limits(profile: MachineProfile, config: SuperpipeConfig) -> Limits:
    """What was allowed, else what the device has; a device that is the host sets no limit of its own."""
    device = config.device_memory if isinstance(config.device_memory, int) else None
    if device is None and not profile.emulated:
        device = (profile.room.device_free or profile.room.device_total) or None
    return Limits(device, config.host_memory if isinstance(config.host_memory, int) else None)


def _asked(profile: MachineProfile, played: PlayedStep, config: SuperpipeConfig, *, has_limit: bool) -> Asked:
    names = [unit.tape.name for unit in played.units]
    policies: tuple[str | None, ...] = ()
    parts = config.first_micro_batches
    if config.activations != "auto" or parts > 1:
        policies = tuple(
            choice.policy.value for choice in choose_policies(config.activations, names, micro_batches=parts)
        )
        for policy, unit in zip(policies, played.units, strict=True):
            if policy not in unit.policies:
                raise ConfigError(f"activations: unit {unit.tape.name!r} cannot {policy}. Use 'keep' or 'auto' for it.")
    # With k open, k_prime=1 is the default and nobody's wish.
    k_prime: int | None = config.k_prime if isinstance(config.k_prime, int) else None
    if config.k == "auto" and k_prime == 1:
        k_prime = None
    update = config.update
    if update == "auto":
        is_stored = config.is_on_disk("weights") or config.is_on_disk("states")
        gains_nothing = profile.emulated and not config.update_on_device and not is_stored
        update = "at_once" if gains_nothing else "after_backward"
    return Asked(
        k=config.k if isinstance(config.k, int) else None,
        k_prime=k_prime,
        resident=config.resident if isinstance(config.resident, int) else None,
        activations=policies,
        micro_batches=None if config.micro_batches == "auto" else parts,
        update=update,
        update_on_device=0.0 if config.update_on_device == "auto" else float(config.update_on_device),
        most_slots=None if has_limit else most_slots(config, shares_memory=profile.emulated),
    )


def _windows(
    workload: Workload, speeds: Speeds, limits: Limits, asked: Asked, choice: Choice | None
) -> Iterator[Window]:
    """Predict a table of (k, k') under the chosen policies, with nothing resident, and the choice itself."""
    activations = tuple(policy or "keep" for policy in asked.activations)
    base = Setting(
        1,
        activations=activations,
        micro_batches=asked.micro_batches or 1,
        update=asked.update,
        update_on_device=asked.update_on_device,
    )
    base = base if choice is None else choice.setting
    num_units = len(workload.units)
    sizes = [k for k in _WINDOWS if k < num_units] + [num_units] if asked.k is None else [min(asked.k, num_units)]
    pairs = [(k, k_prime) for k in sizes for k_prime in sorted({1, max(1, k // 2)})]
    settings = [
        replace(base, k=k, k_prime=k_prime, resident=0)
        for k, k_prime in pairs
        if asked.k_prime is None or k_prime == min(asked.k_prime, k)
    ]
    if choice is not None and choice.setting not in settings:
        settings.append(choice.setting)
    for setting in sorted(settings, key=lambda each: (each.k + each.resident, each.k, each.k_prime)):
        need = needed_bytes(workload, setting).total
        fits = limits.device_bytes is None or need <= limits.device_bytes
        is_chosen = choice is not None and setting == choice.setting
        yield Window(setting, simulate(workload, speeds, setting), fits, is_chosen)


def _rendered(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, markup=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return [line for line in capture.get().splitlines() if line.strip()]


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
