"""The hop between host memory and a file that activations take: written behind forward, read ahead of backward.

What a unit's call saved travels as one piece of the file, whatever it consists of, and past the page cache: by the
mapping the same bytes take three times as long (experiments/07_disk). A few buffers stand between file and
device; a copy to the host waits until one of them has been written, and so does the device's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from lightning_superpipe.engine.fetching import Buffer, Ring, moving
from lightning_superpipe.engine.host_lane import HostEvent, HostLane, Past, Regardless
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.parcels import HostPool, Parcel, Place
from lightning_superpipe.engine.slots import aligned
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.planning.need import ACTIVATION_BUFFERS
from lightning_superpipe.tiers import StoredSlab, Tier, padded

__all__ = ["Arrival", "FileHop"]


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
        self._pool.give_back(Place(self.slab, Regardless(self.last_use)))


class FileHop:
    """Moves parcels between the device and files.

    Args:
        memory: gives the buffers, each as large as the largest batch.
        lanes: their recorder is told of reads and writes.
    """

    def __init__(self, pool: HostPool, memory: Tier, lanes: Lanes) -> None:
        self._pool, self._lanes = pool, lanes
        self._ring = Ring(memory, ACTIVATION_BUFFERS)
        self._writes = HostLane("superpipe-write-activations")
        self._reads = HostLane("superpipe-read-activations")

    def send(self, parcels: Sequence[Parcel], sources: Sequence[Tensor], label: Label) -> Event:
        """Queue the way of a batch from the device to the file.

        Args:
            sources: the parcels' bytes on the device, each uint8 and flat.

        Returns:
            The end of the copies: the device's bytes are not needed any more.
        """
        ends = list(accumulate(aligned(source.numel()) for source in sources))
        shelf = _Shelf(self._pool, padded(ends[-1]))
        buffer = self._take(shelf)
        starts = [0, *ends[:-1]]
        copies = [
            Copy(buffer.piece(start, source.numel()), source) for start, source in zip(starts, sources, strict=True)
        ]
        copied = self._lanes.d2h(copies, after=[self._lanes.compute_event(), buffer.free], label=label)
        write = partial(self._write, shelf.slab, buffer.piece(0, shelf.num_bytes), copied, label)
        buffer.free_after = self._writes.submit(write, after=Past(), done=shelf.stored)
        for parcel, start in zip(parcels, starts, strict=True):
            parcel.place = Place(shelf.slab, None, start, shelf)
        return copied

    def _take(self, shelf: _Shelf) -> Buffer:
        buffer = self._ring.take(shelf.num_bytes)
        assert buffer is not None, "nobody holds a buffer here"
        return buffer

    def _write(self, slab: StoredSlab, memory: Tensor, copied: Event, label: Label) -> None:
        copied.synchronize()
        with moving(self._lanes, Lane.WRITE, label, memory):
            slab.store(memory)

    def fetch(self, parcels: Sequence[Parcel], targets: Sequence[Tensor], label: Label) -> list[Arrival]:
        """Queue the way of parcels back to the device.

        Args:
            targets: where they go on the device, each uint8 and flat.
        """
        of_shelves: dict[_Shelf, list[tuple[Parcel, int, Tensor]]] = {}
        for parcel, target in zip(parcels, targets, strict=True):
            place = parcel.place
            assert place is not None and isinstance(place.hold, _Shelf), "it was sent from here"
            of_shelves.setdefault(place.hold, []).append((parcel, place.start, target))
        return [self._fetch(shelf, together, label) for shelf, together in of_shelves.items()]

    def _fetch(self, shelf: _Shelf, together: list[tuple[Parcel, int, Tensor]], label: Label) -> Arrival:
        buffer = self._take(shelf)
        read = partial(self._read, shelf, buffer.piece(0, shelf.num_bytes), buffer.free, label)
        ready = self._reads.submit(read, after=Past())
        copies = [Copy(target, buffer.piece(start, parcel.num_bytes)) for parcel, start, target in together]
        arrival = self._lanes.h2d(copies, after=[self._lanes.compute_event(), ready], label=label)
        buffer.free_after = shelf.last_use = arrival
        return Arrival([parcel for parcel, *_ in together], arrival)

    def _read(self, shelf: _Shelf, memory: Tensor, free: Event, label: Label) -> None:
        free.synchronize()
        shelf.ensure()
        with moving(self._lanes, Lane.READ, label, memory):
            shelf.slab.fetch(memory)

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        for lane in (self._writes, self._reads):
            lane.close()
        self._ring.close()
