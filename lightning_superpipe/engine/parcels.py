"""Parcels: saved storages on their way between device and host, and the host memory they use in every step."""

from __future__ import annotations

import weakref
from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.tiers import Slab, Tier

__all__ = ["Hold", "HostPool", "Parcel", "Place"]


class Hold(Protocol):
    """What parcels share that travel as one piece; the piece is free again once nobody has it any more.

    Attributes:
        is_lost: the bytes could not be brought there.
    """

    @property
    def is_lost(self) -> bool: ...

    def ensure(self) -> None:
        """Block until the bytes are there; raise what has kept them from that."""


class Place(NamedTuple):
    """Where a parcel lies outside the device, and the end of the last copy from or to it.

    Attributes:
        start: of the parcel in the slab, in bytes.
        hold: where others lie in the slab as well.
    """

    slab: Slab
    last_copy: Event | None
    start: int = 0
    hold: Hold | None = None


class HostPool:
    """Host memory that is used again; what has become too small is exchanged for larger, so the pool never creeps.

    There are never more slabs than parcels were alive at once.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._free: list[Place] = []
        # Graphs are freed on any thread, in the middle of anything: finalizers take no lock, they only queue.
        self._returned: deque[Place] = deque()
        self._is_open = True
        self.num_allocations = 0

    def take(self, num_bytes: int) -> Place:
        """Return the smallest free place that is large enough, or a new one."""
        while self._returned:
            self._free.append(self._returned.popleft())
        fitting = [place for place in self._free if place.slab.num_bytes >= num_bytes]
        if fitting:
            place = min(fitting, key=_size)
            self._free = [other for other in self._free if other is not place]
            return place
        if self._free:
            outgrown = max(self._free, key=_size)
            self._free = [other for other in self._free if other is not outgrown]
            if outgrown.last_copy is not None:
                outgrown.last_copy.synchronize()
            outgrown.slab.close()
        self.num_allocations += 1
        with raw_tensors():
            return Place(self._tier.allocate(num_bytes), None)

    def give_back(self, place: Place) -> None:
        """Take a place back; callable from finalizers."""
        if self._is_open:
            self._returned.append(place)

    def close(self) -> None:
        """Forget all places; the tier closes what it has handed out."""
        self._is_open = False
        self._free.clear()
        self._returned.clear()


def _size(place: Place) -> int:
    return place.slab.num_bytes


class Parcel:
    """One storage that autograd saved, whatever views of it: on the device, on its way, or on the host.

    Graphs own it: when the last of them is freed its host memory returns to the pool.

    Attributes:
        device_bytes: shape (num_bytes,), uint8; None while it is on the host only.
        version: of the tensor that was saved, to find out later whether it was written to in between.
        place: where it is on the host; None until it is sent.
        arrival: end of the copy to the device that compute has not waited for yet.
    """

    def __init__(self, tensor: Tensor, pool: HostPool) -> None:
        self.device_bytes: Tensor | None = _bytes_of(tensor)
        self.num_bytes = self.device_bytes.numel()
        self.storage = weakref.ref(tensor.untyped_storage())
        self.version = tensor._version
        self.witness: Tensor | None = tensor.detach()  # shares the version with everything that can write to it
        self.was_modified = False
        self.place: Place | None = None
        self.arrival: Event | None = None
        self._pool = weakref.ref(pool)

    @property
    def is_lost(self) -> bool:
        """Whether the bytes were to go where they could not be brought, and are not on the device any more."""
        hold = None if self.place is None else self.place.hold
        return hold is not None and hold.is_lost and self.device_bytes is None

    def host_bytes(self) -> Tensor:
        """The bytes on the host, shape (num_bytes,), uint8.

        Raises:
            TransferError: they could not be written there.
        """
        assert self.place is not None, "the parcel was never sent"
        if self.place.hold is not None:
            self.place.hold.ensure()
        return self.place.slab.bytes[self.place.start : self.place.start + self.num_bytes]

    def let_go(self) -> None:
        """Drop the device's bytes: they are on the host."""
        if self.witness is not None:
            self.was_modified |= self.witness._version != self.version
        self.device_bytes = self.witness = None

    def __del__(self) -> None:
        pool = self._pool()
        if pool is not None and self.place is not None and self.place.hold is None:
            pool.give_back(self.place)


def _bytes_of(tensor: Tensor) -> Tensor:
    with raw_tensors():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
