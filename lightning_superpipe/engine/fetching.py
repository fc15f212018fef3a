"""Fetching: the hop from files to host memory that precedes a copy to the device, or an update.

A few buffers, used again and again. Units on their way to the device are read by a thread of their own, in the order of
the plan; where buffers are free it reads ahead of the slots. What is read for a backward that an update follows stays
in its buffer until then, and is updated and written from there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_superpipe.engine.host_lane import HostLane, Past, Regardless
from lightning_superpipe.engine.lanes import Event, Label, Lanes, now
from lightning_superpipe.engine.pending import Pending
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import Slab, StoredSlab, Tier

__all__ = ["Buffer", "FetchRing", "Fetched", "Kept", "Place", "Ring", "moving"]


@contextlib.contextmanager
def moving(lanes: Lanes, lane: Lane, label: Label, memory: Tensor) -> Iterator[None]:
    """Scope of a read or write of files: it is recorded, and what fails names the unit."""
    start = now()
    try:
        yield
    except TransferError as error:
        raise TransferError(f"unit {label.unit_name!r}: {error}") from error
    if lanes.recorder is not None:
        lanes.recorder.span(lane, label.name, label.unit, start, now(), memory.numel())


class Place:
    """Host memory that begins at a page. What was left there may be read until somebody else has taken it.

    Attributes:
        turn: counts who has taken it.
        lock: held by whoever reads what was left, and for a moment by who takes it.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.turn = 0
        self.lock = threading.Lock()

    def piece(self, start: int, num_bytes: int) -> Tensor:
        """A part of the memory, shape (num_bytes,), uint8."""
        return self.slab.bytes[start : start + num_bytes]

    def begin_turn(self) -> None:
        """Somebody takes it: what was left there is gone."""
        with self.lock:
            self.turn += 1


class Buffer(Place):
    """A place of a ring; ``free_after`` is the end of what last reads or writes it."""

    def __init__(self, slab: Slab) -> None:
        super().__init__(slab)
        self.free_after: Event = Past()
        self.holder: Unit | None = None

    @property
    def free(self) -> Event:
        """Passes with ``free_after``, whether that has failed or not."""
        return Regardless(self.free_after)


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
        buffer.begin_turn()
        if buffer.slab.num_bytes < num_bytes:
            buffer.free.synchronize()
            buffer.slab.close()
            buffer.slab = self._tier.allocate(num_bytes)
        self._buffers = [*(each for each in self._buffers if each is not buffer), buffer]
        return buffer

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


class Kept(NamedTuple):
    """Weights that stay in a buffer for their update.

    Attributes:
        slab: whose bytes they are.
        copied: the end of their copy to the device.
        stamp: of the unit when they were read, see :meth:`Unit.trust`.
    """

    buffer: Buffer
    slab: StoredSlab
    copied: Event
    stamp: tuple[object, ...]


class FetchRing:
    """Reads stored units, in the order in which they are asked for.

    Args:
        tier: gives the buffers.
        num_buffers: for units on their way to the device; as many more, made when needed, for those that are kept.
        lanes: their recorder is told of reads.

    Attributes:
        num_ahead: fetches that had begun before a slot was free.
        num_claimed: updates that found their weights in memory.
        awaited: units that will be updated as soon as their gradients are home.
        on_wanted: called with a unit whose update begins, though nothing of it was kept; who has its bytes may
            :meth:`keep` them.
    """

    def __init__(self, tier: Tier, num_buffers: int, lanes: Lanes) -> None:
        self._ring, self._lanes = Ring(tier, num_buffers), lanes
        self._num_buffers = self._num_kept = num_buffers
        self._lane = HostLane("superpipe-read")
        self._ahead: dict[int, Fetched] = {}
        self._kept: dict[int, Kept] = {}
        self._num_lent = 0
        self._lock = threading.Lock()
        self._room_bytes = 0
        self.num_ahead = self.num_claimed = 0
        self.awaited: Container[int] = ()
        self.on_wanted: Callable[[Unit], None] | None = None

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
            if self._num_buffers - len(self._ahead) < 2:
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
        pending = unit.pending
        updated = Past() if pending is None else pending.changed
        ready = self._lane.submit(partial(self._read, unit, slab, target, buffer.free, pending), after=updated)
        buffer.free_after = ready
        return Fetched(buffer, target[: slab.num_bytes], ready)

    def _read(self, unit: Unit, slab: StoredSlab, target: Tensor, free: Event, pending: Pending | None) -> None:
        free.synchronize()
        if pending is not None:
            if pending.left_over is not None and pending.left_over.copy_weights(slab, target):
                return
            pending.done.synchronize()  # files hold new weights only then
        with moving(self._lanes, Lane.READ, Label("P", unit.index, unit.name), target):
            slab.fetch(target)

    # -- what stays for an update

    def release(self, unit: Unit, fetched: Fetched, copied: Event) -> None:
        """The bytes are needed until they are copied; where the unit's update comes next, keep them for that."""
        slab = unit.stored
        if unit.index not in self.awaited or slab is None or unit.pending is not None:
            fetched.hold_until(copied)
            return
        with self._lock:
            if not self._may_keep(unit):
                fetched.hold_until(copied)
                return
            fetched.buffer.free_after = copied
            self._keep(unit, fetched.buffer)

    def room_for(self, unit: Unit) -> Buffer | None:
        """A free buffer into which the weights of a unit may leave its slot, to be given to :meth:`keep`; None if all
        are in use.
        """
        slab = unit.stored
        with self._lock:
            if slab is None or not self._may_keep(unit):
                return None
            buffer = self._ring.take(max(self._room_bytes, slab.room_bytes))
        return buffer if buffer is not None and buffer.free_after.query() else None

    def keep(self, unit: Unit, buffer: Buffer) -> None:
        """A unit's weights lie in a buffer of :meth:`room_for` now."""
        buffer.free_after = Past()
        with self._lock:
            self._keep(unit, buffer)

    def _may_keep(self, unit: Unit) -> bool:
        """Make room for one more unit, if need be in place of the oldest: the next forward needs that last."""
        self._ring.num_buffers = self._num_buffers + self._num_kept
        self._drop(unit.index)
        if len(self._kept) + self._num_lent >= self._num_kept and self._kept:
            self._drop(next(iter(self._kept)))
        return self._num_lent < self._num_kept

    def _keep(self, unit: Unit, buffer: Buffer) -> None:
        assert unit.stored is not None, "only stored units have a use for it"
        buffer.holder = unit
        self._kept[unit.index] = Kept(buffer, unit.stored, buffer.free_after, unit.trust())

    def kept(self, unit: Unit) -> Kept | None:
        """What was kept of a unit whose update begins, if nothing has changed since."""
        if unit.index not in self._kept and self.on_wanted is not None:
            self.on_wanted(unit)
        with self._lock:
            found = self._kept.get(unit.index)
            if found is None or (found.slab is unit.stored and unit.pending is None and found.stamp == unit.trust()):
                return found
            self._drop(unit.index)
            return None

    def claim(self, kept: Kept) -> bool:
        """Take what was kept, to be changed in place; False if it had to make room. From any thread."""
        kept.copied.synchronize()
        with self._lock:
            index = next((index for index, each in self._kept.items() if each is kept), None)
            if index is None:
                return False
            del self._kept[index]
            self._num_lent += 1
            self.num_claimed += 1
        return True

    def give_back(self, kept: Kept) -> None:
        """What was claimed is not needed any more, though it may be read until somebody takes the buffer."""
        with self._lock:
            self._num_lent -= 1
            kept.buffer.free_after, kept.buffer.holder = Past(), None

    def _drop(self, index: int) -> None:
        if (kept := self._kept.pop(index, None)) is not None:
            kept.buffer.holder = None

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        self._lane.close()
        self._ahead.clear()
        self._kept.clear()
        self._ring.close()
