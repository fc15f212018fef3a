"""Homes of optimizer states in files: a slab for each unit and optimizer; the state tensors stay the user's objects."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.slots import aligned, storage_use_count
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer.state_size import missing_state_sizes
from lightning_superpipe.tiers import StoredSlab, Tier, trim_heap

__all__ = ["StateHomes"]

_LONE_USES = 3  # its own, that of the list it is looked at in, and that of whoever asks
_Layout = tuple[tuple[int, str, int], ...]


class _Home(NamedTuple):
    """A slab, and what was laid out in it: parameter, name and bytes of each state, in order, and its tensor."""

    slab: StoredSlab
    layout: _Layout
    tensors: list[weakref.ref[Tensor]]

    def suits(self, layout: _Layout, values: Sequence[Tensor]) -> bool:
        """Whether states can lie here: nobody holds others that do, such as those from before a load."""
        held = [each() for each in self.tensors]
        return layout == self.layout and all(
            each is None or each is value for each, value in zip(held, values, strict=True)
        )


class StateHomes:
    """Moves states into files, and says where they lie."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._homes: WeakKeyDictionary[Optimizer, dict[int, _Home]] = WeakKeyDictionary()
        self._to_come: WeakKeyDictionary[Optimizer, Sequence[Unit]] = WeakKeyDictionary()

    def slab(self, unit: Unit, optimizer: Optimizer) -> StoredSlab | None:
        """The states of a unit's parameters in one optimizer; None where none are in files."""
        home = self._homes.get(optimizer, {}).get(unit.index)
        return None if home is None else home.slab

    def reserve(self, optimizer: Optimizer, units: Sequence[Unit], *, with_masters: bool) -> None:
        """Take the room of states that will be made, those of optimizers from before included.

        Raises:
            BudgetError: the disk has no room for them.
        """
        self._to_come[optimizer] = units
        layouts = (
            missing_state_sizes(each, unit.parameters, with_masters=with_masters)
            for each, its_units in self._to_come.items()
            for unit in its_units
        )
        self._tier.reserve(sum(map(aligned, layout)) for layout in layouts)

    def adopt(self, unit: Unit, optimizer: Optimizer) -> None:
        """Move the states of a unit's parameters into its slab, as far as they are not there: made or loaded anew.

        The slab holds theirs alone. The states of a parameter that has left the unit, and those that somebody still
        holds when others have been loaded, keep the old one for themselves.
        """
        with raw_tensors():
            found = [
                (id(parameter), name, value)
                for parameter in unit.parameters
                if parameter in optimizer.state
                for name, value in optimizer.state[parameter].items()
                if isinstance(value, Tensor) and _is_movable(value)
            ]
            if not found:  # all that had states has left the unit
                self.leave(unit, optimizer)
                return
            layout = tuple((key, name, value.nbytes) for key, name, value in found)
            values = [value for *_, value in found]
            homes = self._homes.setdefault(optimizer, {})
            home = homes.get(unit.index)
            slab = home.slab if home is not None and home.suits(layout, values) else self._allocate(layout)
            num_moved = _move(slab, values)
            homes[unit.index] = _Home(slab, layout, list(map(weakref.ref, values)))
            if home is not None and home.slab is not slab:
                home.slab.close()
            if num_moved:
                trim_heap()  # a first step would hold the states of all units otherwise

    def leave(self, unit: Unit, optimizer: Optimizer) -> None:
        """Read and write no slab for a unit any more; states that lie in its own keep it for themselves."""
        if (home := self._homes.get(optimizer, {}).pop(unit.index, None)) is not None:
            home.slab.close()

    def _allocate(self, layout: _Layout) -> StoredSlab:
        slab = self._tier.allocate(sum(aligned(size) for *_, size in layout))
        assert isinstance(slab, StoredSlab), "homes are for files"
        return slab


def _move(slab: StoredSlab, tensors: list[Tensor]) -> int:
    """Move tensors into a slab; return how many were elsewhere."""
    offset = num_moved = 0
    for tensor in tensors:
        if tensor.data_ptr() != slab.bytes.data_ptr() + offset:
            tensor.data = slab.carve(offset, tensor).copy_(tensor)
            slab.note_written(tensor.nbytes)
            num_moved += 1
        offset += aligned(tensor.nbytes)
    return num_moved


def _is_movable(value: Tensor) -> bool:
    """Whether a state belongs into files: it is worth it, and nobody shares its memory."""
    return (
        value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() > 1
        and storage_use_count(value) <= _LONE_USES
    )
