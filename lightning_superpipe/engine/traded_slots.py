"""Slots in host memory that trade it: where the device is the host, what was read from a file need not be copied.

A buffer into which a unit has been read becomes its slot's memory, and the ring gets what the slot had. A unit whose
update comes next leaves the same way: its weights are updated where they are, and written from there.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.engine.slots import Slot, SlotPool
from lightning_superpipe.errors import BudgetError
from lightning_superpipe.tiers import Slab, Tier

__all__ = ["TradedSlots", "make_slots"]


def make_slots(lanes: Lanes, tier: Tier, k: int, slot_bytes: int, *, poison: bool, seed: int | None) -> SlotPool:
    """Return slots that trade their memory where that saves copies; arguments as those of :class:`SlotPool`.

    Args:
        tier: of the session.
    """
    if lanes.shares_memory and not tier.part("weights").is_memory:
        return TradedSlots(k, slot_bytes, tier.part("slots", pin=False), poison=poison, seed=seed)
    return SlotPool(lanes.device, k, slot_bytes, poison=poison, seed=seed)


class TradedSlots(SlotPool):
    """Slots whose memory can be traded.

    Args:
        tier: gives the memory, whole pages of it.

    Attributes:
        parking: where twins of units that have left their slots point, so that nobody's view stays behind in memory
            that is traded; never filled, so that it takes address space alone.
        num_traded: how often memory has changed hands.
    """

    def __init__(self, k: int, slot_bytes: int, tier: Tier, *, poison: bool, seed: int | None) -> None:
        self._tier = tier
        self._slabs: dict[int, Slab] = {}
        super().__init__(torch.device("cpu"), k, slot_bytes, poison=poison, seed=seed)
        self.parking = Slot(-1, self._allocate())
        self.num_traded = 0

    def _allocate(self) -> Tensor:
        try:
            slab = self._tier.allocate(-(-self.slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        except BudgetError as error:
            raise torch.OutOfMemoryError(str(error)) from error  # what devices raise
        buffer = self._carve(slab)
        self._slabs[buffer.untyped_storage().data_ptr()] = slab
        return buffer.fill_(255) if self._poison else buffer

    def _carve(self, slab: Slab) -> Tensor:
        """A storage of its own, so that its owners can be counted."""
        with torch.inference_mode(False):
            return slab.carve(0, torch.empty(self.slot_bytes, dtype=torch.uint8, device="meta"))

    def trade(self, slot: Slot, slab: Slab) -> bool:
        """Let a slot and a slab have each other's memory; False if sizes differ, or somebody holds a view of it."""
        own = self._slabs[slot.address]
        if slot.has_escaped or not own.trade(slab):
            return False
        del self._slabs[slot.address]
        self._put(slot, self._carve(own))
        self._slabs[slot.address] = own
        self.num_traded += 1
        return True

    def abandon_storage(self, slot: Slot) -> None:
        super().abandon_storage(slot)
        self._close_others()

    def drop(self, count: int) -> list[Slot]:
        dropped = super().drop(count)
        self._close_others()
        return dropped

    def resize(self, slot_bytes: int) -> None:
        super().resize(slot_bytes)
        self.parking._replace(self._allocate())
        self._close_others()

    def _close_others(self) -> None:
        """Give up memory that no slot has any more."""
        kept = {slot.address for slot in (*self.slots, self.parking)}
        for address in self._slabs.keys() - kept:
            self._slabs.pop(address).close()

    def close(self) -> None:
        super().close()
        for slab in self._slabs.values():
            slab.close()
        self._slabs.clear()
