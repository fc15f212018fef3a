"""What a training step asks of a disk: bytes read and written, and the drive's life they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from humanize import naturalsize

__all__ = ["DiskWork", "StoredUnit", "disk_work"]

_TERA = 1e12


@dataclass(frozen=True)
class StoredUnit:
    """A unit's bytes in files.

    Attributes:
        weight_bytes: read before each load.
        state_bytes: read by each update.
        is_updated: its update reads and writes weights and states; frozen units are only read.
        gradient_bytes: written when they come home; what reads them pages them in.
    """

    weight_bytes: int = 0
    state_bytes: int = 0
    is_updated: bool = True
    gradient_bytes: int = 0


@dataclass(frozen=True)
class DiskWork:
    """Bytes that one step moves.

    >>> str(DiskWork(read_bytes=3 << 30, written_bytes=2 << 30))
    '3.0 GiB read and 2.0 GiB written in each step'
    """

    read_bytes: int = 0
    written_bytes: int = 0

    def since(self, earlier: DiskWork) -> DiskWork:
        """Return what has been moved since then."""
        return DiskWork(self.read_bytes - earlier.read_bytes, self.written_bytes - earlier.written_bytes)

    def life(self, endurance_tb: float) -> float:
        """Return the share of the drive's life that one step costs.

        Args:
            endurance_tb: what may be written in its life, 10^12 bytes.

        >>> DiskWork(written_bytes=6_000_000_000).life(600)
        1e-05
        """
        return self.written_bytes / (endurance_tb * _TERA)

    def wear(self, endurance_tb: float | None) -> str:
        """Return what one step costs of the drive's life, in words.

        >>> DiskWork(written_bytes=6_000_000_000).wear(600), DiskWork(read_bytes=1).wear(None)
        ("1.00e-05 of the drive's life", 'nothing is written, so the drive does not wear')
        """
        if not self.written_bytes:
            return "nothing is written, so the drive does not wear"
        if endurance_tb is None:
            return "set disk.endurance_tb to see what that costs of the drive's life"
        return f"{self.life(endurance_tb):.2e} of the drive's life"

    def __str__(self) -> str:
        read, written = (naturalsize(size, binary=True) for size in (self.read_bytes, self.written_bytes))
        return f"{read} read and {written} written in each step"


def disk_work(loads: Iterable[int], units: Sequence[StoredUnit]) -> DiskWork:
    """Return what a step moves.

    Args:
        loads: each unit that the plan loads, as often as it does.
        units: by their index.

    >>> disk_work([0, 1, 0], [StoredUnit(4, 8), StoredUnit(4, 0, is_updated=False)])
    DiskWork(read_bytes=24, written_bytes=12)
    """
    updated = sum(unit.weight_bytes + unit.state_bytes for unit in units if unit.is_updated)
    gradients = sum(unit.gradient_bytes for unit in units)
    return DiskWork(sum(units[index].weight_bytes for index in loads) + updated, updated + gradients)
