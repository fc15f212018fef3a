"""Fetching: the hop from files to host memory that precedes a copy to the device, or an update.

A few buffers, used again and again. Units on their way to the device are read by a thread of their own, in the order of
the plan; where buffers are free it reads ahead of the slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_superpipe.engine.host_lane import HostLane, Past
from lightning_superpipe.engine.lanes import Event, Lanes, now
from lightning_superpipe.engine.pending import LeftOver
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import Slab, StoredSlab, Tier

__all__ = ["Buffer", "FetchRing", "Fetched", "Ring"]


class Buffer:
    """Host memory that begins at a page; ``free_after`` is the end of what last reads or writes it."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.free_after: Event = Past()
        self.holder: Unit | None = None

    def piece(self, start: int, num_bytes: int) -> Tensor:
        """A part of the memory, shape (num_bytes,), uint8."""
        return self.slab.bytes[start : start + num_bytes]


class Ring:
    """Buffers that take turns.

    Args:
        tier: gives them, in host memory.
        num_buffers: made as they are needed.
    """

    def __init__(self, tier: Tier, num_buffers: int) -> None:
        self._tier, self.num_buffers = tier, num_buffers
        self._buffers: list[Buffer] = []

    def take(self, num_bytes: int) -> Buffer | None:
        """Return the buffer that will be free first, of at least so many bytes; None if all are held."""
        if len(self._buffers) < self.num_buffers:
            buffer = Buffer(self._tier.allocate(num_bytes))
        elif (buffer := next((each for each in self._buffers if each.holder is None), None)) is None:  # type: ignore[assignment]
            return None
        if buffer.slab.num_bytes < num_bytes:
            with contextlib.suppress(Exception):  # who waits for a failed copy is told
                buffer.free_after.synchronize()
            buffer.slab.close()
            buffer.slab = self._tier.allocate(num_bytes)
        self._buffers = [*(each for each in self._buffers if each is not buffer), buffer]
        return buffer

    @property
    def num_free(self) -> int:
        """Buffers that nobody holds."""
        return self.num_buffers - sum(each.holder is not None for each in self._buffers)

    def close(self) -> None:
        self._buffers.clear()


class Fetched(NamedTuple):
    """A unit's bytes in a buffer, as they lie in its slab, complete once ``ready`` has passed."""

    buffer: Buffer
    bytes: Tensor
    ready: Event

    def hold_until(self, event: Event) -> None:
        """Let nothing be read into the buffer before what reads it is over."""
        self.buffer.free_after, self.buffer.holder = event, None


class FetchRing:
    """Reads stored units, in the order in which they are asked for.

    Args:
        tier: gives the buffers.
        lanes: their recorder is told of reads.

    Attributes:
        num_ahead: fetches that had begun before a slot was free.
    """

    def __init__(self, tier: Tier, num_buffers: int, lanes: Lanes) -> None:
        self._ring, self._lanes = Ring(tier, num_buffers), lanes
        self._lane = HostLane("superpipe-read")
        self._ahead: dict[int, Fetched] = {}
        self._room_bytes = 0
        self.num_ahead = 0

    def note_sizes(self, units: Sequence[Unit]) -> None:
        """Units were installed: buffers are as large as the largest."""
        self._room_bytes = max((unit.stored.room_bytes for unit in units if unit.stored is not None), default=0)

    def fetch(self, unit: Unit) -> Fetched:
        """Start reading a unit behind its update, unless that has begun already and is still good."""
        found = self._ahead.pop(unit.index, None)
        if found is not None:
            if unit.is_fetched():
                self.num_ahead += 1
                return found
            found.hold_until(found.ready)
        while (fetched := self._start(unit)) is None:
            self._drop_last()
        return fetched

    def look_ahead(self, units: Iterable[Unit]) -> None:
        """Start reading units that will be needed next, as far as buffers allow; one stays for surprises."""
        for unit in units:
            if self._ring.num_free < 2:
                return
            if unit.stored is None or unit.index in self._ahead or (fetched := self._start(unit)) is None:
                continue
            fetched.buffer.holder = unit
            self._ahead[unit.index] = fetched
            unit.note_fetched()

    def _drop_last(self) -> None:
        index = next(reversed(self._ahead))
        dropped = self._ahead.pop(index)
        dropped.hold_until(dropped.ready)

    def _start(self, unit: Unit) -> Fetched | None:
        slab = unit.stored
        assert slab is not None, "only stored units are fetched"
        buffer = self._ring.take(max(self._room_bytes, slab.room_bytes))
        if buffer is None:
            return None
        target = buffer.piece(0, slab.room_bytes)
        updated = Past() if unit.pending is None else unit.pending.done
        left_over = None if unit.pending is None else unit.pending.left_over
        ready = self._lane.submit(partial(self._read, unit, slab, target, buffer.free_after, left_over), after=updated)
        buffer.free_after = ready
        return Fetched(buffer, target[: slab.num_bytes], ready)

    def _read(self, unit: Unit, slab: StoredSlab, target: Tensor, free: Event, left_over: LeftOver | None) -> None:
        with contextlib.suppress(Exception):  # a copy that failed tells those who wait for it
            free.synchronize()
        if left_over is not None and left_over.copy_weights(slab, target):
            return
        start = now()
        try:
            slab.fetch(target)
        except TransferError as error:
            raise TransferError(f"unit {unit.name!r}: {error}") from error
        if self._lanes.recorder is not None:
            self._lanes.recorder.span(Lane.READ, "P", unit.index, start, now(), target.numel())

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        self._lane.close()
        self._ahead.clear()
        self._ring.close()
