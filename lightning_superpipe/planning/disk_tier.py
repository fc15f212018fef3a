"""What of a training stays in host memory where the rest lies in files, and what files mean for a step's time."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from typing import NamedTuple

from humanize import naturalsize

from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.lower import spread
from lightning_superpipe.planning.workload import UnitWork, Workload

__all__ = ["FileChoice", "choose_files", "with_files"]

RING = 3
"""Buffers between disk and host work: one is read into, one is used, one is ready between them."""

_LEAST_RING = 2
_MOVABLE = ("weights", "states")


class FileChoice(NamedTuple):
    """What the options leave open about files.

    Attributes:
        ring: buffers between disk and device, and as many between disk and update.
        in_memory: units whose weights and states stay in host memory all the same, because there is room.
        in_memory_bytes: of these, as the host counts them, what a step is undone with included.
    """

    ring: int = RING
    in_memory: frozenset[int] = frozenset()
    in_memory_bytes: int = 0

    def remark(self, num_units: int, *, is_used: bool) -> str:
        """Return the choice as a further line of a report; nothing where nothing lies in files.

        >>> FileChoice().remark(8, is_used=False)
        ''
        """
        return f"\nFiles: {self.describe(num_units)}." if is_used else ""

    def describe(self, num_units: int) -> str:
        """Return the choice in words.

        >>> FileChoice(3, frozenset({0, 4}), 2 << 20).describe(8)
        'ring of 3 buffers; 2 of 8 units stay in host memory (2.0 MiB): 0, 4'
        >>> FileChoice().describe(8)
        'ring of 3 buffers; no unit stays in host memory (host_memory says how much there is for them)'
        """
        if not self.in_memory:
            stay = "no unit stays in host memory (host_memory says how much there is for them)"
        else:
            size, listed = naturalsize(self.in_memory_bytes, binary=True), ", ".join(map(str, sorted(self.in_memory)))
            stay = f"{len(self.in_memory)} of {num_units} units stay in host memory ({size}): {listed}"
        return f"ring of {self.ring} buffers; {stay}"


def choose_files(
    need: HostNeed, kinds: Collection[str], sizes: Sequence[int], *, ring: int | None, undo: bool, limit: int | None
) -> FileChoice:
    """Return a ring that fits, and as many units in host memory as fit beside it, evenly spread.

    A unit in memory saves all of its traffic; a longer ring saves none, so memory goes to units first.

    Args:
        need: of the training, without files.
        kinds: in files.
        sizes: weights of each unit, bytes.
        ring: as asked; None leaves it open.
        undo: a step that fails is undone.
        limit: bytes of host memory for everything; None keeps no units in memory.

    >>> need = HostNeed(weights=100, gradients=100, states=200)
    >>> choice = choose_files(need, {"weights", "states"}, [10] * 10, ring=None, undo=False, limit=325)
    >>> choice.ring, sorted(choice.in_memory)
    (3, [0, 5])
    >>> choose_files(need, {"weights", "states"}, [10] * 10, ring=None, undo=False, limit=200).ring
    2
    """
    streamed, largest = sum(sizes), max(sizes, default=0)

    def total(num_buffers: int, kept: int) -> int:
        sized = {"streamed": streamed, "largest": largest, "num_buffers": num_buffers}
        return need.with_files(kinds, **sized, undo=undo, kept=kept).total

    if limit is None:
        return FileChoice(ring or RING)
    buffers = ring or (RING if total(RING, 0) <= limit else _LEAST_RING)
    chosen, least = FileChoice(buffers), total(buffers, 0)
    for count in range(1, len(sizes) + 1 if any(kind in kinds for kind in _MOVABLE) else 1):
        units = spread(range(len(sizes)), count)
        needed = total(buffers, sum(sizes[unit] for unit in units))
        if needed > limit:
            break
        chosen = FileChoice(buffers, units, needed - least)
    return chosen


def with_files(
    workload: Workload,
    kinds: Collection[str],
    in_memory: Container[int] = (),
    *,
    ring: int = RING,
    sizes: Sequence[int] | None = None,
) -> Workload:
    """Return a workload of which kinds lie in files: each hop has its bytes.

    What is trained in a mostly frozen unit stays in memory, with its states.

    Args:
        in_memory: units, by their place in the workload, whose weights and states do not.
        sizes: of the units' weights in files, bytes; None where they are as on the device.

    >>> unit = UnitWork("h", weight_bytes=10, gradient_bytes=10, state_bytes=20)
    >>> moved = with_files(Workload((unit,)), {"weights", "states"}).units[0]
    >>> moved.disk_read_bytes, moved.disk_update_bytes, moved.disk_write_bytes, moved.state_bytes
    (10, 30, 30, 0)
    """
    stored = [unit.weight_bytes for unit in workload.units] if sizes is None else sizes
    units = (
        unit if index in in_memory else _in_files(unit, kinds, stored[index], trains=workload.trains)
        for index, unit in enumerate(workload.units)
    )
    others = tuple(sorted(set(kinds) - set(_MOVABLE)))
    return replace(workload, units=tuple(units), ring=ring, in_files=others)


def _in_files(unit: UnitWork, kinds: Container[str], size: int, *, trains: bool) -> UnitWork:
    weights = size if "weights" in kinds else 0
    if not trains or 2 * unit.gradient_bytes <= unit.weight_bytes:
        return replace(unit, disk_read_bytes=weights)
    states = unit.state_bytes if "states" in kinds else 0
    return replace(
        unit,
        state_bytes=unit.state_bytes - states,
        disk_read_bytes=weights,
        disk_update_bytes=weights + states,
        disk_write_bytes=weights + states,
    )
