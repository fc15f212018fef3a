"""What a prediction starts from, as plain numbers: the work of the units, the speeds of a machine, and one setting."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lightning_superpipe.errors import PlanError

__all__ = ["ALIKE", "Curve", "Setting", "Speeds", "UnitWork", "Workload", "updated_on_device", "updated_there"]

ALIKE = 1.25
"""A line through two sizes that differ by less than this factor would show noise as a rate."""


@dataclass(frozen=True)
class Curve:
    """How long moving bytes takes: measured points, with straight lines between them and beyond the last.

    What lies beyond goes on from a point that is clearly smaller than the last, if there is one.

    Attributes:
        points: (bytes, seconds), ascending in bytes; at least one. Below the first point its seconds hold: that is the
            cost of any copy, however small.

    Raises:
        PlanError: there is no point, or points that do not ascend.

    >>> link = Curve(((1_000, 1e-5), (1_000_000, 1e-4), (10_000_000, 1e-3)))
    >>> link.seconds(10), link.seconds(5_500_000), round(link.seconds(100_000_000), 6)
    (1e-05, 0.00055, 0.01)
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or any(later <= earlier for earlier, later in pairwise(sizes)):
            raise PlanError(f"sizes {sizes}: a curve has at least one point, and each is larger than the one before.")

    @classmethod
    def steady(cls, bytes_per_s: float, latency_s: float = 0.0) -> Curve:
        """Return the curve of a fixed cost and a fixed rate.

        >>> Curve.steady(1e9, latency_s=0.001).seconds(2_000_000)
        0.003
        """
        return cls(((0, latency_s), (1 << 30, latency_s + (1 << 30) / bytes_per_s)))

    def seconds(self, num_bytes: int) -> float:
        """Return how long one copy of so many bytes takes, in seconds."""
        sizes = [size for size, _ in self.points]
        at = bisect_left(sizes, num_bytes)
        if at == 0:
            return self.points[0][1]
        if at == len(sizes):
            (last, last_s) = self.points[-1]
            at = bisect_right(sizes, last / ALIKE)
            if at == 0:
                return last_s * num_bytes / max(last, 1)
            low, low_s = self.points[at - 1]
            return low_s + (last_s - low_s) * (num_bytes - low) / (last - low)
        (low, low_s), (high, high_s) = self.points[at - 1 : at + 1]
        return low_s + (high_s - low_s) * (num_bytes - low) / (high - low)


@dataclass(frozen=True)
class Speeds:
    """What a machine can do. Measured, never taken from a data sheet.

    Attributes:
        h2d: one copy to the device, alone.
        d2h: one copy home, alone.
        both: as many bytes each way at once, until both are over; None if the ways do not disturb each other.
        use_s: what the engine itself takes for each use of a unit, seconds.
        disk_read: one read of a file into host memory; None without a disk.
        disk_write: likewise.
    """

    h2d: Curve
    d2h: Curve
    both: Curve | None = None
    use_s: float = 0.0
    disk_read: Curve | None = None
    disk_write: Curve | None = None

    def read_s(self, num_bytes: int) -> float:
        """Return how long reading so many bytes from a file takes, seconds; nothing where nobody has measured it."""
        return self.disk_read.seconds(num_bytes) if num_bytes and self.disk_read is not None else 0.0

    def write_s(self, num_bytes: int) -> float:
        """Likewise of writing."""
        return self.disk_write.seconds(num_bytes) if num_bytes and self.disk_write is not None else 0.0

    def file_update_s(self, unit: UnitWork) -> float:
        """Return how long a unit's update reads and writes files, seconds, where its weights are in memory."""
        states = unit.disk_state_bytes
        written_s = self.write_s(states) + self.write_s(unit.disk_write_bytes - states)
        return self.read_s(states) + written_s


@dataclass(frozen=True)
class UnitWork:
    """One unit's part of a training step, for one batch.

    Attributes:
        name: of the module.
        weight_bytes: copied to the device by each load.
        gradient_bytes: copied home; 0 for a frozen unit.
        state_bytes: of its optimizer states, masters included, in host memory.
        forward_s: compute of its forward, seconds.
        backward_s: of its backward, with activations kept (recomputing adds ``forward_s``), seconds.
        update_s: of its optimizer step on the host, seconds; of its part of one where gradients accumulate.
        update_on_device_s: of the same on the device, without copies; None where it cannot run there.
        activation_bytes: held from its forward to its backward when kept.
        input_bytes: held instead when recomputed: its inputs, as far as nothing else holds them.
        offload_bytes: of ``activation_bytes``, what offloading moves to the host and back.
        forward_bytes: most that its forward takes beside all that is held, its outputs included.
        backward_bytes: most that its backward takes beside all that is held: its own gradients count, others' do not.
        unfreed_backward_bytes: as ``backward_bytes``, if nothing that its forward saved is let go meanwhile; less where
            nobody has measured it.
        policies: what may become of its activations.
        splits: whether its batch may be split into micro-batches.
        disk_read_bytes: read from a disk before each load.
        disk_update_bytes: read from a disk by each update, weights and states by themselves.
        disk_write_bytes: written to a disk by each update, likewise.
    """

    name: str
    weight_bytes: int
    gradient_bytes: int = 0
    state_bytes: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    update_on_device_s: float | None = None
    activation_bytes: int = 0
    input_bytes: int = 0
    offload_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    unfreed_backward_bytes: int = 0
    policies: tuple[str, ...] = ("keep", "recompute", "offload")
    splits: bool = True
    disk_read_bytes: int = 0
    disk_update_bytes: int = 0
    disk_write_bytes: int = 0

    @property
    def disk_state_bytes(self) -> int:
        """Of what updates read from a disk, that which loads do not read."""
        return max(0, self.disk_update_bytes - self.disk_read_bytes)

    @property
    def updates_weights_in_files(self) -> bool:
        """Whether its weights are read for its loads and for its updates."""
        return 0 < self.disk_read_bytes <= self.disk_update_bytes


@dataclass(frozen=True)
class Workload:
    """One training step of a model (or one forward, if it is not trained), for one batch.

    Attributes:
        units: in order of execution.
        anchor_bytes: what has a permanent copy on the device.
        turn_s: compute between the last unit's forward and its backward: head and loss, forward and backward, seconds.
        turn_bytes: most that this takes on the device.
        between_s: from the end of backward to the next forward, updates not counted: data, logging, the loop itself.
        trains: there is a backward pass.
        lowest: the first unit with anything to train; backward ends there.
        samples: in the batch, for rates.
        tokens: in the batch; 0 where nobody counts them.
        undisturbed: the loop lets nobody write to weights between steps (as Lightning's without hooks does), so that
            units which no step has changed may stay on the device.
        updates: optimizer steps for each of these steps; less than 1 where gradients accumulate.
        update_bytes: what updates on the device keep there, if any unit is updated there.
        kernel_bytes: most that their kernels take beside that.
        ring: buffers between files and memory, for each of loads and updates.
        in_files: ``"gradients"`` and ``"activations"``, if they lie there; weights and states are told by unit.
        staging_bytes: host memory of buffers, of casts, and of copies to undo a step with.
        shares_memory: the device is the host, so that weights in a slot need not be read again for their update.
        batch_bytes: of the tensors that units are given in forward, in each step that was measured, first in the one
            whose memory is this one's. They say how much batches differ; empty where only one batch is known.
    """

    units: tuple[UnitWork, ...]
    anchor_bytes: int = 0
    turn_s: float = 0.0
    turn_bytes: int = 0
    between_s: float = 0.0
    trains: bool = True
    lowest: int = 0
    samples: int = 1
    tokens: int = 0
    undisturbed: bool = False
    updates: float = 1.0
    update_bytes: int = 0
    kernel_bytes: int = 0
    ring: int = 3
    in_files: tuple[str, ...] = ()
    staging_bytes: int = 0
    shares_memory: bool = False
    batch_bytes: tuple[int, ...] = ()

    @cached_property
    def has_stored_units(self) -> bool:
        """Whether weights or states of units lie in files."""
        return any(unit.disk_read_bytes or unit.disk_update_bytes for unit in self.units)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest unit's."""
        return max((unit.weight_bytes for unit in self.units), default=0)


@dataclass(frozen=True)
class Setting:
    """One choice of all knobs; each is an option of the same name.

    Attributes:
        k: most units on the device at once.
        k_prime: units moved per transfer.
        resident: units that stay beside those ``k``.
        activations: a policy for each unit, by its place in the order of execution; empty keeps all.
        micro_batches: parts of the batch inside units that recompute.
        update: ``"at_once"``, ``"after_backward"`` or ``"in_backward"``.
        update_on_device: share of the units that are updated on the device.
    """

    k: int
    k_prime: int = 1
    resident: int = 0
    activations: tuple[str, ...] = ()
    micro_batches: int = 1
    update: str = "after_backward"
    update_on_device: float = 0.0

    def policy(self, unit: int) -> str:
        """Return what becomes of a unit's activations.

        >>> Setting(k=2).policy(5), Setting(k=2, activations=("recompute", "keep")).policy(0)
        ('keep', 'recompute')
        """
        return self.activations[unit] if self.activations else "keep"


def updated_on_device(first_needed: Sequence[int], share: float) -> frozenset[int]:
    """Return the units that are updated on the device: those which the next forward needs first.

    Backward has used them last, so that some still lie in slots; and nothing hides their update on the host.

    Args:
        first_needed: all units, in the order of the forward.
        share: of all units, 0.0 to 1.0; any share above 0 is one unit at least.

    >>> sorted(updated_on_device([2, 0, 1, 3], 0.5)), sorted(updated_on_device([2, 0, 1, 3], 0.01))
    ([0, 2], [2])
    """
    return frozenset(first_needed[: math.ceil(share * len(first_needed) - 1e-9)])


def updated_there(workload: Workload, setting: Setting) -> frozenset[int]:
    """Return the units that a setting updates on the device: of its share, those of which that is known to work.

    >>> units = (UnitWork("h.0", 1), UnitWork("h.1", 1, update_on_device_s=1.0))
    >>> sorted(updated_there(Workload(units), Setting(k=1, update_on_device=1.0)))
    [1]
    """
    if not workload.trains or not setting.update_on_device:
        return frozenset()
    units = workload.units
    found = updated_on_device(range(len(units)), setting.update_on_device)
    return frozenset(index for index in found if units[index].update_on_device_s is not None)
