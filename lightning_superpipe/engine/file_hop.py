"""The hop between host memory and a file that activations take: written behind forward, read ahead of backward.

What a unit's call saved travels as one piece of the file, whatever it consists of, and past the page cache: by the
mapping the same bytes take three times as long (experiments/07_disk). A few buffers stand between file and
device; a copy to the host waits until one of them has been written, and so does the device's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superpipe.engine.fetching import Buffer, Ring
from lightning_superpipe.engine.host_lane import HostEvent, HostLane, Past
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes, now
from lightning_superpipe.engine.parcels import HostPool, Parcel, Place
from lightning_superpipe.engine.slots import ALIGNMENT
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import StoredSlab, Tier, padded

__all__ = ["NUM_BUFFERS", "Arrival", "FileHop"]

NUM_BUFFERS = 3
"""One is copied from or to, one is written or read, one is next."""


class Arrival(NamedTuple):
    """Parcels on their way to the device, and the end of their copy."""

    parcels: list[Parcel]
    event: Event


class _Shelf:
    """A piece of the file that parcels share; free again with the last of them.

    Attributes:
        num_bytes: that are written and read, whole pages.
        stored: the end of the write; carries its error.
    """

    def __init__(self, pool: HostPool, num_bytes: int) -> None:
        slab = pool.take(num_bytes).slab
        assert isinstance(slab, StoredSlab), "what lies in memory needs no hop"
        self._pool, self.slab, self.num_bytes = pool, slab, num_bytes
        self.stored = HostEvent()
        self.last_use: Event = self.stored

    @property
    def is_lost(self) -> bool:
        return self.stored.error is not None

    def ensure(self) -> None:
        self.stored.synchronize()

    def __del__(self) -> None:
        self._pool.give_back(Place(self.slab, _Regardless(self.last_use)))


class _Regardless(NamedTuple):
    """An event without its error: whoever needs the bytes is told, and nobody who only needs the memory."""

    event: Event

    def query(self) -> bool:
        return self.event.query()

    def synchronize(self) -> None:
        with contextlib.suppress(Exception):
            self.event.synchronize()


class FileHop:
    """Moves parcels between the device and files.

    Args:
        memory: gives the buffers, each as large as the largest batch.
        lanes: their recorder is told of reads and writes.
    """

    def __init__(self, pool: HostPool, memory: Tier, lanes: Lanes) -> None:
        self._pool, self._lanes = pool, lanes
        self._ring = Ring(memory, NUM_BUFFERS)
        self._writes = HostLane("superpipe-write-activations")
        self._reads = HostLane("superpipe-read-activations")

    def send(self, parcels: Sequence[Parcel], sources: Sequence[Tensor], label: Label) -> Event:
        """Queue the way of a batch from the device to the file.

        Args:
            sources: the parcels' bytes on the device, each uint8 and flat.

        Returns:
            The end of the copies: the device's bytes are not needed any more.
        """
        ends = list(accumulate(-(-source.numel() // ALIGNMENT) * ALIGNMENT for source in sources))
        shelf = _Shelf(self._pool, padded(ends[-1]))
        buffer = self._take(shelf)
        starts = [0, *ends[:-1]]
        copies = [
            Copy(buffer.piece(start, source.numel()), source) for start, source in zip(starts, sources, strict=True)
        ]
        copied = self._lanes.d2h(
            copies, after=[self._lanes.compute_event(), _Regardless(buffer.free_after)], label=label
        )
        write = partial(self._write, shelf.slab, buffer.piece(0, shelf.num_bytes), copied, label)
        buffer.free_after = _Regardless(self._writes.submit(write, after=Past(), done=shelf.stored))
        for parcel, start in zip(parcels, starts, strict=True):
            parcel.place = Place(shelf.slab, None, start, shelf)
        return copied

    def _take(self, shelf: _Shelf) -> Buffer:
        buffer = self._ring.take(shelf.num_bytes)
        assert buffer is not None, "nobody holds a buffer here"
        return buffer

    def _write(self, slab: StoredSlab, memory: Tensor, copied: Event, label: Label) -> None:
        copied.synchronize()
        start = now()
        with _named(label):
            slab.store(memory)
        self._record(Lane.WRITE, label, start, memory)

    def fetch(self, parcels: Sequence[Parcel], targets: Sequence[Tensor], label: Label) -> list[Arrival]:
        """Queue the way of parcels back to the device.

        Args:
            targets: where they go on the device, each uint8 and flat.
        """
        of_shelves: dict[int, list[tuple[Parcel, Tensor]]] = {}
        for parcel, target in zip(parcels, targets, strict=True):
            assert parcel.place is not None, "the parcel was never sent"
            of_shelves.setdefault(id(parcel.place.hold), []).append((parcel, target))
        return [self._fetch(together, label) for together in of_shelves.values()]

    def _fetch(self, together: list[tuple[Parcel, Tensor]], label: Label) -> Arrival:
        place = together[0][0].place
        assert place is not None and isinstance(place.hold, _Shelf), "it was sent from here"
        shelf = place.hold
        buffer = self._take(shelf)
        read = partial(self._read, shelf, buffer.piece(0, shelf.num_bytes), _Regardless(buffer.free_after), label)
        ready = self._reads.submit(read, after=Past())
        copies = [
            Copy(target, buffer.piece(parcel.place.start, parcel.num_bytes))
            for parcel, target in together
            if parcel.place is not None
        ]
        arrival = self._lanes.h2d(copies, after=[self._lanes.compute_event(), ready], label=label)
        buffer.free_after = shelf.last_use = _Regardless(arrival)
        return Arrival([parcel for parcel, _ in together], arrival)

    def _read(self, shelf: _Shelf, memory: Tensor, free: Event, label: Label) -> None:
        free.synchronize()
        shelf.ensure()
        start = now()
        with _named(label):
            shelf.slab.fetch(memory)
        self._record(Lane.READ, label, start, memory)

    def _record(self, lane: Lane, label: Label, start: float, memory: Tensor) -> None:
        if self._lanes.recorder is not None:
            self._lanes.recorder.span(lane, label.name, label.unit, start, now(), memory.numel())

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        for lane in (self._writes, self._reads):
            lane.close()
        self._ring.close()


@contextlib.contextmanager
def _named(label: Label) -> Iterator[None]:
    """Let what fails name the unit."""
    try:
        with torch.no_grad():
            yield
    except TransferError as error:
        raise TransferError(f"unit {label.unit_name!r}: {error}") from error
