"""Slots: k device buffers as large as the largest unit, allocated once."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_superpipe.engine.backend import storage_address
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.errors import PlanError

__all__ = ["ALIGNMENT", "Slot", "SlotPool", "aligned", "storage_key", "storage_use_count"]

# Bytes. Allocators of devices give at least this, and kernels may choose their path by it.
ALIGNMENT = 256


def aligned(num_bytes: int) -> int:
    """Return the bytes that a piece takes among others in one memory.

    >>> aligned(1), aligned(256), aligned(0)
    (256, 256, 0)
    """
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def storage_use_count(tensor: Tensor) -> int:
    """How many owners the tensor's storage has in C++ (tensors, views, graphs), and one more that asks."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's storage; two tensors share memory if their keys are equal."""
    return int(tensor.untyped_storage()._cdata)


class Slot:
    """One device buffer.

    Attributes:
        buffer: shape (slot_bytes,), uint8, on the device.
        tenant: index of the unit whose bytes it holds or receives; None while free.
        num_twins: twins whose data points here, those of earlier tenants included.
        free_after: compute that may still read the buffer; a copy into it waits for this event.
    """

    def __init__(self, index: int, buffer: Tensor) -> None:
        self.index = index
        self.num_twins = 0
        self.tenant: int | None = None
        self.free_after: Event | None = None
        self._replace(buffer)

    def _replace(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.address = buffer.untyped_storage().data_ptr()
        self._own_uses = storage_use_count(buffer)
        self._typed: dict[torch.dtype, Tensor] = {}

    def view(self, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """A typed view from ``offset`` bytes on."""
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.buffer.view(dtype)
        return typed.as_strided(size, stride, offset // dtype.itemsize)

    @property
    def has_escaped(self) -> bool:
        """Whether anybody beside the slot and the twins still holds a view of the buffer."""
        return storage_use_count(self.buffer) > self._own_uses + len(self._typed) + self.num_twins


class SlotPool:
    """The k slots of an engine.

    Args:
        k: number of slots.
        slot_bytes: bytes of each.
        poison: fill a slot with NaN bytes when it becomes free.
        seed: load into a random free slot; None takes them in order.
    """

    def __init__(self, device: torch.device, k: int, slot_bytes: int, *, poison: bool, seed: int | None) -> None:
        self.device = device
        self.slot_bytes = slot_bytes
        self._poison = poison
        self._rng = None if seed is None else random.Random(seed)
        self.slots = [Slot(index, self._allocate()) for index in range(k)]
        self._free = list(self.slots)
        self._by_address = {slot.address: slot for slot in self.slots}
        self.num_escapes = 0

    def _allocate(self) -> Tensor:
        with torch.inference_mode(False):
            try:
                buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.device)
            except RuntimeError as error:
                if self.device.type != "cpu":
                    raise
                raise torch.OutOfMemoryError(str(error).partition("\n")[0]) from error  # what devices raise
            return buffer.fill_(255) if self._poison else buffer

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return len(self.slots) * self.slot_bytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def of(self, tensor: Tensor) -> Slot | None:
        """The slot that a tensor lies in; None for all other tensors."""
        if tensor.device.type != self.device.type or (address := storage_address(tensor)) is None:
            return None
        return self._by_address.get(address)

    def take(self, unit: int) -> Slot:
        """Give a free slot to a unit.

        Raises:
            PlanError: no slot is free.
        """
        if not self._free:
            raise PlanError(f"no slot is free for unit {unit}: all {len(self.slots)} are taken.")
        slot = self._free.pop(self._rng.randrange(len(self._free)) if self._rng else 0)
        slot.tenant = unit
        return slot

    def give_back(self, slot: Slot, compute_event: Callable[[], Event]) -> None:
        """Make a slot free; what computes on it now may finish first, and so may the poison."""
        if self._poison:
            slot.buffer.fill_(255)
        slot.tenant, slot.free_after = None, compute_event()
        self._free.append(slot)

    def abandon_storage(self, slot: Slot) -> None:
        """Leave the buffer to whoever still holds views of it, and give the slot a new one."""
        self._put(slot, self._allocate())
        self.num_escapes += 1

    def _put(self, slot: Slot, buffer: Tensor) -> None:
        """Give a slot other memory, which has been allocated before: where there is none, the slot must stay whole."""
        self._by_address.pop(slot.address, None)
        slot._replace(buffer)
        self._by_address[slot.address] = slot

    def extend(self, count: int, *, free_after: Event) -> None:
        """Add slots.

        Args:
            free_after: compute that may still use the memory that the allocator gives to them.
        """
        added = [Slot(len(self.slots) + index, self._allocate()) for index in range(count)]
        for slot in added:
            slot.free_after = free_after
        self.slots += added
        self._free += added
        self._by_address |= {slot.address: slot for slot in added}

    def drop(self, count: int) -> list[Slot]:
        """Give up free slots, and return them; whoever points at their memory still holds it."""
        dropped, self._free = self._free[-count:], self._free[:-count]
        self.slots = [slot for slot in self.slots if slot not in dropped]
        for index, slot in enumerate(self.slots):
            slot.index = index
        self._by_address = {slot.address: slot for slot in self.slots}
        return dropped

    def resize(self, slot_bytes: int) -> None:
        """Give every slot new memory of another size; all must be free."""
        self.slot_bytes = slot_bytes
        for slot in self.slots:
            slot._replace(self._allocate())
        self._by_address = {slot.address: slot for slot in self.slots}

    def close(self) -> None:
        """Drop all buffers."""
        self.slots.clear()
        self._free.clear()
        self._by_address.clear()
