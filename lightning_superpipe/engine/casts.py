"""Casts of twins that autocast's cache holds: their memory goes when their unit has computed, and returns with it.

The cache keeps a converted copy of every weight until the outermost ``autocast`` block ends: in a streamed forward pass
that would be the whole model at half its size. Clearing the cache would be inexact where a unit is called twice: both
calls must share one cast, because their gradients are summed in its dtype. So the tensor in the cache stays, and only
its memory is let go.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.owners import graph_reference, num_owners
from lightning_superpipe.engine.slots import SlotPool
from lightning_superpipe.engine.unit import Unit

__all__ = ["Casts", "Conversion"]

_CACHED_OWNERS = 2  # of a tensor that the cache holds: the cache, and the Python object that we look at it with


class CastWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every conversion of slot memory inside a unit's call, also those that leave no trace in the graph.

    (Frozen weights, which LoRA trains beside; parts of a weight.) It costs microseconds for each operation, so it is
    used only where it is needed.
    """

    def __init__(self, casts: Casts, slots: SlotPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._casts, self._slots = casts, slots

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and self._slots.of(args[0]) is not None:
            self._casts.watched[result.untyped_storage().data_ptr()] = Conversion(args[0], result)
        return result


class Conversion(NamedTuple):
    """A view of a slot and what it was converted to; held during the call, so that no address is used twice."""

    source: Tensor
    result: Tensor


class _Cast(NamedTuple):
    """A converted twin that autograd has seen; ``position`` is that of the parameter in its unit."""

    position: int
    tensor: Tensor

    def is_cached(self) -> bool:
        """Whether somebody besides us holds the tensor in C++."""
        return num_owners(self.tensor) == _CACHED_OWNERS


class Casts:
    """The casts that autograd saved in the unit calls in progress, and those without memory, by index of their unit.

    Attributes:
        watched: conversions seen in the calls in progress, by address of their result.
    """

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self._seen: dict[int, dict[int, _Cast]] = {}  # by id of the tensor, which may be saved many times
        self._emptied: dict[int, list[_Cast]] = {}
        self._own_references: int | None = None
        self._hidden: set[int] = set()
        self.watched: dict[int, Conversion] = {}

    def watch(self, unit: Unit, slots: SlotPool) -> contextlib.AbstractContextManager[Any]:
        """Scope of a unit's call: a watch, if autocast may convert weights in ways that the graph does not show."""
        if not torch.is_grad_enabled() or not torch.is_autocast_enabled(self._device_type):
            return contextlib.nullcontext()
        if unit.index in self._hidden or any(p.dtype is torch.float32 and not p.requires_grad for p in unit.parameters):
            return CastWatch(self, slots)
        return contextlib.nullcontext()

    def watch_from_now_on(self, unit: Unit) -> None:
        """Autograd saved a conversion of a unit's weight that was not recognised."""
        self._hidden.add(unit.index)

    def note(self, unit: Unit, position: int, saved: Tensor) -> None:
        """Autograd saves a converted twin, or a view of one, inside a unit's call."""
        tensor = saved if saved._base is None else saved._base
        self._seen.setdefault(unit.index, {})[id(tensor)] = _Cast(position, tensor)

    def let_go(self, unit: Unit, *, is_evaluation: bool) -> None:
        """A unit's call has ended: nothing but the cache needs the memory of its casts.

        Args:
            is_evaluation: nobody will ask for gradients, so that a second cast has the same bits as the first.
        """
        if is_evaluation and not torch.is_grad_enabled() and torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()
        self.watched.clear()
        for cast in self._seen.pop(unit.index, {}).values():
            if cast.position not in unit.has_own_storage and self._is_only_cached(cast):
                with raw_tensors():
                    cast.tensor.data = torch.empty(0, dtype=cast.tensor.dtype, device=cast.tensor.device)
                self._emptied.setdefault(unit.index, []).append(cast)

    def fill(self, unit: Unit) -> None:
        """A unit is about to compute: casts that the cache would hand out get their bytes again."""
        for cast in self._emptied.pop(unit.index, []):
            if cast.is_cached():
                with raw_tensors():
                    cast.tensor.data = unit.twin(cast.position).data.to(cast.tensor.dtype)
                self.note(unit, cast.position, cast.tensor)

    def sweep(self) -> None:
        """Drop what no cache holds any more: the autocast block has ended."""
        self._seen.clear()
        cached = {index: [cast for cast in casts if cast.is_cached()] for index, casts in self._emptied.items()}
        self._emptied = {index: casts for index, casts in cached.items() if casts}

    def _is_only_cached(self, cast: _Cast) -> bool:
        """Whether the cache is the only holder of a cast: what a user's code holds must keep its bytes."""
        if self._own_references is None:
            lone = _Cast(0, torch.empty(0))
            self._own_references = _references(lone) + graph_reference()
        return cast.is_cached() and _references(cast) == self._own_references


def _references(cast: _Cast) -> int:
    """Python references to the tensor of a cast, counted the same way wherever it comes from."""
    return sys.getrefcount(cast.tensor)
