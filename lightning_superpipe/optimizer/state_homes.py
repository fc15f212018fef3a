"""Homes of optimizer states in files: a slab for each unit and optimizer; the state tensors stay the user's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.slots import ALIGNMENT, storage_use_count
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.tiers import StoredSlab, Tier

__all__ = ["StateHomes"]

_LONE_USES = 2  # its own, and that of whoever asks


class _Home(NamedTuple):
    """A slab, and the bytes of each tensor that was laid out in it, in order."""

    slab: StoredSlab
    sizes: tuple[int, ...]


class StateHomes:
    """Moves states into files, and says where they lie."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._homes: WeakKeyDictionary[Optimizer, dict[int, _Home]] = WeakKeyDictionary()

    def slab(self, unit: Unit, optimizer: Optimizer) -> StoredSlab | None:
        """The states of a unit's parameters in one optimizer; None where none are in files."""
        home = self._homes.get(optimizer, {}).get(unit.index)
        return None if home is None else home.slab

    def adopt(self, unit: Unit, optimizer: Optimizer, some: Iterable[Member]) -> None:
        """Move the states of a unit's parameters into its slab, as far as they are not there: made or loaded anew."""
        with raw_tensors():
            parameters = {id(member.parameter): member.parameter for member in some}
            tensors = [
                value
                for parameter in parameters.values()
                for value in optimizer.state.get(parameter, {}).values()
                if _is_movable(value)
            ]
            slab = self.slab(unit, optimizer)
            if slab is not None and all(_lies_in(slab, tensor) for tensor in tensors):
                return
            self._move(unit, optimizer, tensors)

    def _move(self, unit: Unit, optimizer: Optimizer, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        sizes = tuple(tensor.nbytes for tensor in tensors)
        homes = self._homes.setdefault(optimizer, {})
        home = homes.get(unit.index)
        if home is None or home.sizes != sizes:
            slab = self._tier.allocate(sum(map(_aligned, sizes)))
            assert isinstance(slab, StoredSlab), "homes are for files"
            homes[unit.index] = _Home(slab, sizes)
            if home is not None:
                home = None  # its region stays: tensors that moved elsewhere may still lie in it
        offset = 0
        for tensor in tensors:
            place = homes[unit.index].slab.carve(offset, tensor)
            if tensor.data_ptr() != place.data_ptr():
                place.copy_(tensor)
                tensor.data = place
            offset += _aligned(tensor.nbytes)


def _is_movable(value: object) -> bool:
    """Whether a state belongs into files: a tensor that is worth it, and whose memory nobody shares."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() > 1
        and storage_use_count(value) <= _LONE_USES + 1
    )


def _lies_in(slab: StoredSlab, tensor: Tensor) -> bool:
    return 0 <= tensor.data_ptr() - slab.bytes.data_ptr() < slab.num_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
