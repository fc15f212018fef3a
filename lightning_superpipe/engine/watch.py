"""Watching between unit calls: host parameters that are read outside their unit.

A loss that regularises weights, a tied projection written as ``F.linear(h, self.emb.weight)``, a reference taken early:
such a parameter becomes an anchor before the operation runs, and the operation gets its device copy.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_superpipe.engine.backend import is_on_host

__all__ = ["EvalWatch", "TrainWatch", "WatchHost", "pause"]

_BACKWARD = (torch.autograd.backward, Tensor.backward)
_VIEW_GETTERS = frozenset(("T", "mT", "H", "mH", "real", "imag"))
# Functions that look at a parameter but do not read its values.
_METADATA = frozenset(
    (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_shared", "is_pinned", "is_inference"),
        *("is_set_to", "_is_view", "data_ptr", "untyped_storage", "requires_grad_", "detach_", "register_hook"),
        *("register_post_accumulate_grad_hook", "__len__", "__repr__", "__format__", "__hash__"),
        *("__deepcopy__", "__reduce_ex__"),  # copies are the host's
    )
)


class WatchHost(Protocol):
    """What the watches need of the engine."""

    def read_outside(self, tensor: Tensor, function: str) -> Tensor:
        """Note that a tensor is an operand outside any unit; return what the operation must get instead."""

    def is_buffer(self, value: object) -> bool:
        """Whether a value is a host buffer that has a device copy."""

    def mixes(self, operands: Sequence[Tensor]) -> bool:
        """Whether an operation has operands that are on the device, or made there, and others that are the host's."""

    def bring_home(self, tensor: Tensor) -> None:
        """An in-place operation has written to the device copy of a host tensor."""

    def may_be_written(self, tensor: Tensor) -> None:
        """Note that user code takes an alias through which it may write."""

    def twins_for(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replace host parameters by the twins that are in the graph."""

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Hooks for tensors saved while a backward pass builds a graph."""

    def recover(self) -> None:
        """Put the model back in order after a backward pass that raised."""

    def host_of_storage(self, address: int) -> Tensor | None:
        """The host parameter or buffer whose storage starts at an address."""


class TrainWatch(TorchFunctionMode):
    """Active between unit calls of a training step."""

    def __init__(self, host: WatchHost) -> None:
        super().__init__()
        self._host = weakref.ref(host)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        host, kwargs = self._host(), kwargs or {}
        if host is None or torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        if func in _BACKWARD or func is torch.autograd.grad:
            return self._differentiate(host, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute == "data":
                host.may_be_written(args[0])
            elif attribute in _VIEW_GETTERS:
                args = (host.read_outside(args[0], attribute), *args[1:])
        elif name not in ("__set__", "__delete__") and name not in _METADATA:
            return self._operate(host, func, name, args, kwargs)
        return func(*args, **kwargs)

    def _operate(self, host: WatchHost, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation with what it must get for its operands."""
        in_place = name.endswith("_") and not name.endswith("__")
        mixes = host.mixes(_tensors((args, kwargs)))
        if in_place and not mixes and not any(map(host.is_buffer, args[:1])):
            for tensor in _tensors(args[:1]):  # an optimizer, or the user, writes on the host
                host.may_be_written(tensor)
            return func(*args, **kwargs)
        if not (mixes or in_place or torch.is_grad_enabled()):
            return func(*args, **kwargs)
        given = (args, kwargs)
        args, kwargs = _substituted(host, args, name), _substituted(host, kwargs, name)
        if args is given[0] and kwargs is given[1]:
            return func(*args, **kwargs)
        with host.saving():  # what is saved of a twin must become a token here too
            result = func(*args, **kwargs)
        if in_place:
            host.bring_home(given[0][0])
        return result

    def _differentiate(self, host: WatchHost, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a backward pass: with twins for host parameters, and back in order if it raises."""
        if kwargs.get("inputs") is not None:
            kwargs = {**kwargs, "inputs": host.twins_for(_as_sequence(kwargs["inputs"]))}
        elif func is torch.autograd.grad and len(args) > 1:
            args = (args[0], host.twins_for(_as_sequence(args[1])), *args[2:])
        builds_graph = bool(kwargs.get("create_graph"))
        try:
            with host.saving() if builds_graph else contextlib.nullcontext():
                return func(*args, **kwargs)
        except BaseException:
            host.recover()
            raise


class EvalWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active between unit calls of an evaluation step on a separate device.

    No gradients are needed there, so replacing the operand below autograd will do; a function mode would switch
    Python's fast paths off and change numbers.
    """

    def __init__(self, host: WatchHost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host = weakref.ref(host)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        host, kwargs = self._host(), kwargs or {}
        if host is None or getattr(func, "is_view", False) or func in _COPIES:
            return func(*args, **kwargs)
        if host.mixes(_tensors((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._replaced(host, tensor, str(func)), (args, kwargs))
        return func(*args, **kwargs)

    def _replaced(self, host: WatchHost, tensor: Tensor, function: str) -> Tensor:
        if not is_on_host(tensor):
            return tensor
        owner = host.host_of_storage(tensor.untyped_storage().data_ptr())
        if owner is None:
            return tensor
        copy = host.read_outside(owner, function).detach()
        offset = tensor.storage_offset() - owner.storage_offset() + copy.storage_offset()
        return copy.as_strided(tensor.size(), tensor.stride(), offset)


_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


@contextlib.contextmanager
def pause(mode: TorchFunctionMode | TorchDispatchMode | None) -> Iterator[None]:
    """Take a mode off the top of its stack: units see exactly what they see without us."""
    if isinstance(mode, TorchFunctionMode) and _top(_function_modes()) is mode:
        torch._C._pop_torch_function_stack()
        try:
            yield
        finally:
            torch._C._push_on_torch_function_stack(mode)
    elif isinstance(mode, TorchDispatchMode) and _top(_get_current_dispatch_mode_stack()) is mode:
        torch._C._pop_torch_dispatch_stack(None)
        try:
            yield
        finally:
            torch._C._push_on_torch_dispatch_stack(mode)
    else:
        yield


def _function_modes() -> list[Any]:
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _top(stack: list[Any]) -> Any:
    return stack[-1] if stack else None


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _as_sequence(tensors: Any) -> Sequence[Tensor]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _substituted(host: WatchHost, values: Any, function: str) -> Any:
    """Replace host parameters among operands; containers are rebuilt only if they hold one."""
    if isinstance(values, Tensor):
        return host.read_outside(values, function) if type(values) in (Tensor, nn.Parameter) else values
    if type(values) in (tuple, list):
        replaced = [_substituted(host, value, function) for value in values]
        same = all(new is old for new, old in zip(replaced, values, strict=True))
        return values if same else type(values)(replaced)
    if type(values) is dict:
        new = {key: _substituted(host, value, function) for key, value in values.items()}
        return values if all(new[key] is values[key] for key in values) else new
    return values
