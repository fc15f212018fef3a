"""Staging: host memory in which bytes wait for a copy or have just landed, used again and again.

A unit that changes its dtype on the way is cast into one of a few buffers by a thread of its own, and the buffer is
copied: ``NUM_BUFFERS`` units of host memory, and a cast for every load. (A copy of the whole model in the wire dtype
would take one cast for every update, and 2 more bytes per parameter.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superpipe.engine.casting import cast_into
from lightning_superpipe.engine.host_lane import HostLane, Past, Regardless
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.tiers import Slab, Tier

__all__ = ["NUM_BUFFERS", "Staged", "WireStaging"]

NUM_BUFFERS = 3
"""One is copied from, one is cast into, one is ready between them."""


class _Buffer:
    """One buffer of the ring; ``free_after`` is the copy that reads it."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.free_after: Event = Past()


class Staged(NamedTuple):
    """A unit's bytes in the wire dtype, complete once ``ready`` has passed.

    Attributes:
        bytes: all, laid out as in a slot.
        views: of each parameter.
    """

    buffer: _Buffer
    bytes: Tensor
    views: list[Tensor]
    ready: Event

    def hold_until(self, arrival: Event) -> None:
        """Let nothing be cast into the buffer before a copy that reads it is done."""
        self.buffer.free_after = arrival


class WireStaging:
    """The ring of buffers for units on their way to the device, and the thread that casts into them.

    Args:
        tier: gives the buffers.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._lane = HostLane("superpipe-wire")
        self._ring: list[_Buffer] = []
        self._next = 0

    def stage(self, unit: Unit, *, buffer_bytes: int, after: Event, fetched: Tensor | None = None) -> Staged:
        """Start casting a unit, once its update is done (``after``) and the copy before has left the buffer.

        Args:
            buffer_bytes: of the largest unit.
            fetched: its bytes, where they are read into memory; ``after`` is then the end of that.
        """
        buffer = self._take(buffer_bytes)
        staged = buffer.slab.bytes[: unit.num_bytes]
        views = [
            staged[offset : offset + host.numel() * dtype.itemsize].view(dtype).as_strided(host.size(), host.stride())
            for host, offset, dtype in zip(unit.parameters, unit.offsets, unit.dtypes, strict=True)
        ]
        sources = unit.host_views(fetched)
        ready = self._lane.submit(partial(_cast, Regardless(buffer.free_after), views, sources), after=after)
        return Staged(buffer, staged, views, ready)

    def _take(self, num_bytes: int) -> _Buffer:
        if len(self._ring) < NUM_BUFFERS:
            self._ring.append(_Buffer(self._tier.allocate(num_bytes)))
            return self._ring[-1]
        buffer = self._ring[self._next]
        self._next = (self._next + 1) % NUM_BUFFERS
        if buffer.slab.num_bytes < num_bytes:  # the user has made a unit larger
            buffer.slab = self._tier.allocate(num_bytes)
        return buffer

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        self._lane.close()
        self._ring.clear()


def _cast(free: Event, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    free.synchronize()
    with unfenced(), torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            cast_into(target, source)
