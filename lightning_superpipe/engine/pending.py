"""Fences of updates under way: whoever reads or writes a tensor that an update is still changing waits for its end.

Parameters, gradients and optimizer states are the user's own objects, and may be read at any time: by a checkpoint, an
average of weights, a logger, another optimizer, a line of the user's. While an update is under way each of them is an
instance of a subclass whose ``__torch_function__`` blocks until the update is done. (torch changes the class of tensors
in the same way when lazy parameters get their sizes.) Memory that other tensors share cannot be fenced this way; it is
not updated in the background (:func:`may_be_held`).
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_superpipe.engine.host_lane import HostEvent
from lightning_superpipe.engine.slots import storage_use_count
from lightning_superpipe.tiers import StoredSlab

__all__ = ["Fence", "LeftOver", "Pending", "fence_as", "may_be_held", "settle_before_forks", "unfenced"]

# What tells nothing of a tensor's values, and changes none. Gradients are fenced themselves.
_ATTRIBUTES = frozenset(
    ("grad", "requires_grad", "shape", "dtype", "device", "layout", "is_leaf", "grad_fn", "ndim", "nbytes", "itemsize")
)
_ATTRIBUTES |= {"is_sparse", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_quantized", "is_nested", "names"}
_METHODS = frozenset(("size", "stride", "dim", "numel", "nelement", "element_size", "storage_offset", "get_device"))
_METHODS |= {"is_floating_point", "is_complex", "is_contiguous", "is_pinned", "is_shared", "__len__", "__hash__"}

_LONE_USES = 2  # its own, and that of whoever asks

unfenced = torch._C.DisableTorchFunctionSubclass
"""Scope in which the engine looks at tensors (sizes, addresses, versions) without waiting for anything."""


class LeftOver(Protocol):
    """Updated bytes of a unit that are in host memory still, though its home is a file."""

    def copy_weights(self, slab: StoredSlab, target: Tensor) -> bool:
        """Fill host memory, shape (slab.room_bytes,), uint8, with the slab's bytes; False if they are gone."""


class Pending:
    """One unit's update under way.

    Args:
        tensors: all that it reads or writes.
        on_settled: called once the update is done and the tensors are ordinary ones again, by whoever waited first.

    Attributes:
        done: the end of the update.
        changed: the event behind which new weights may be copied from host memory; the end, but where files are
            written afterwards.
        left_over: memory where a unit from files was updated, as long as nobody needs it for another.
    """

    def __init__(
        self, tensors: Iterable[Tensor | None], done: HostEvent, on_settled: Callable[[Pending], None]
    ) -> None:
        self.done = self.changed = done
        self.left_over: LeftOver | None = None
        self._on_settled = on_settled
        self._tensors: list[Tensor] = []
        self._lock = threading.RLock()
        self.hold(tensors)

    def hold(self, tensors: Iterable[Tensor | None]) -> None:
        """Fence further tensors, but for those that are fenced already."""
        for tensor in tensors:
            if tensor is not None and type(tensor) in _FENCED:
                _held[id(tensor)] = self
                self._tensors.append(tensor)
                tensor.__class__ = _FENCED[type(tensor)]

    def let_go(self, tensors: Iterable[Tensor | None]) -> None:
        """Unfence tensors that the update needs no more, and keep nothing of them."""
        with self._lock:
            gone = {id(tensor) for tensor in tensors if tensor is not None}
            for tensor in self._tensors:
                if id(tensor) in gone:
                    tensor.__class__ = _PLAIN[type(tensor)]
                    del _held[id(tensor)]
            self._tensors = [tensor for tensor in self._tensors if id(tensor) not in gone]

    @property
    def may_be_read_early(self) -> bool:
        """Whether compute may use new weights while their home is still written."""
        return self.changed is not self.done

    def settle(self) -> None:
        """Block until the update is done; its tensors are ordinary ones again.

        Raises:
            What the update raised; once.
        """
        try:
            self.done.synchronize()
        finally:
            with self._lock:
                tensors, self._tensors = self._tensors, []
                for tensor in tensors:
                    tensor.__class__ = _PLAIN[type(tensor)]
                    del _held[id(tensor)]
                if tensors:
                    self._on_settled(self)


def may_be_held(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be fenced: ordinary ones, whose memory no other tensor shares.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> may_be_held([weight])
    True
    >>> alias = weight.detach()
    >>> may_be_held([weight])
    False
    """
    if not all(type(tensor) in _FENCED for tensor in tensors):
        return False
    with unfenced():
        return all(tensor.layout is torch.strided and storage_use_count(tensor) <= _LONE_USES for tensor in tensors)


def fence_as(kind: type[Tensor], *, like: type[Tensor]) -> None:
    """Let tensors of a kind be fenced as those of another are, and be of that other afterwards."""
    _FENCED[kind] = _FENCED[like]


@functools.cache
def settle_before_forks() -> None:
    """A child process has no thread that would finish an update: let every fork wait for all of them."""
    os.register_at_fork(before=_settle_all)


def _settle_all() -> None:
    for pending in list(_held.values()):
        pending.settle()


class Fence(Tensor):
    """A tensor whose values nobody may see before something has been done: whoever looks lets it be done first."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_harmless(func):
            with unfenced():
                return func(*args, **kwargs)
        if not kwargs and (answer := cls.answer(func, args)) is not None:
            return answer
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Fence):
                leaf.settle()
        return func(*args, **kwargs)

    @classmethod
    def answer(cls, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """What a function returns without a look at the values; None for most."""
        return None

    def settle(self) -> None:
        """Do what is to be done; the tensor is an ordinary one then."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        self.settle()
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.settle()
        return self.__reduce_ex__(protocol)


class _Fenced(Fence):
    """A tensor that an update is changing."""

    def settle(self) -> None:
        """Wait for the update; the tensor is an ordinary one then."""
        if (pending := _held.get(id(self))) is not None:
            pending.settle()
        else:  # made by somebody who asked for the type of a fenced one
            self.__class__ = _PLAIN[type(self)]  # type: ignore[assignment]


class _FencedParameter(_Fenced, nn.Parameter):
    """A parameter that an update is changing."""


_FENCED: dict[type[Tensor], type[Tensor]] = {Tensor: _Fenced, nn.Parameter: _FencedParameter}
_PLAIN: dict[type[Any], type[Tensor]] = {fenced: plain for plain, fenced in _FENCED.items()}
_held: dict[int, Pending] = {}


def _is_harmless(func: Any) -> bool:
    """Whether a function tells nothing of a tensor's values, and changes none."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute in _ATTRIBUTES if name == "__get__" else attribute == "grad"
    return name in _METHODS
