"""Whether a unit's call can be repeated: what it was given, what it changed, what it drew at random.

A call that is run again in backward must see what it saw in forward, and must leave nothing behind a second time.
Torch's own generators are restored for it; everything else is looked at here, before and after the call.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.containers import is_immutable

__all__ = ["Traces", "signature", "why_not_again"]

# The flat weights of recurrent layers and the owner are ours to set.
_NOT_STATE = (frozenset(nn.Module().__dict__) - {"training"}) | {
    "_flat_weights",
    "_flat_weight_refs",
    "_superpipe_owner",
}
_CONTAINERS = (list, dict, set, deque)  # a union of types would be made anew for every attribute
_NORMS = (nn.modules.batchnorm._NormBase,)


def why_not_again(modules: Iterable[nn.Module], leaves: Iterable[Any]) -> str | None:
    """Say why a call of these modules with these arguments cannot be repeated, as far as one sees before it."""
    for module in modules:
        if isinstance(module, _NORMS) and module.training and module.track_running_stats:
            return f"{type(module).__name__} updates its statistics in forward"
        # A class is asked in C; torch answers for an instance in Python, for every attribute that is none.
        if any(issubclass(type(value), torch.Generator) for value in module.__dict__.values()):
            return f"{type(module).__name__} draws from a generator of its own"
        if any(
            not _is_of_torch(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ):
            return f"{type(module).__name__} has forward hooks, which would run twice"
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and not is_immutable(leaf):
            advice = " (pass use_cache=False)" if "Cache" in type(leaf).__name__ else ""
            return f"it is given a {type(leaf).__name__}, which it may change{advice}"
    return None


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook belongs to pruning, weight norm and the like: they compute an attribute from parameters."""
    return isinstance(getattr(hook, "_tensor_name", getattr(hook, "name", None)), str)


class _Attribute(NamedTuple):
    """A plain attribute of a module and, of a container, how much is inside."""

    owner: str
    name: str
    value: Any
    size: int


class Traces:
    """What a call could leave behind, noted before it.

    Args:
        modules: that run.
        inputs: tensors that the call is given.
    """

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        self._modules = modules
        self._inputs = [(tensor, _version(tensor)) for tensor in inputs]
        self._attributes = list(_attributes(modules))
        self._buffers = _buffers(modules)
        self._draws = _foreign_draws()

    def found(self) -> str | None:
        """Say what the call has left behind; None if it can be repeated."""
        if any(_version(tensor) != before for tensor, before in self._inputs):
            return "its forward changes its input in place"
        if _buffers(self._modules) != self._buffers:
            return "its forward changes a buffer"
        if _foreign_draws() != self._draws:
            return "its forward draws from the generator of Python or NumPy"
        after = list(_attributes(self._modules))
        for one, other in zip(self._attributes, after, strict=False):
            if one.name != other.name or one.value is not other.value or one.size != other.size:
                return f"its forward sets {other.owner}.{other.name}"
        if len(after) != len(self._attributes):
            return f"its forward sets {after[-1].owner}.{after[-1].name}"
        return None


def signature(modules: Iterable[nn.Module], host_of: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
    """What must be the same when a call is repeated; holds no object.

    Args:
        host_of: returns the host buffer whose device copy a tensor is; other tensors as they are.
    """
    modules = list(modules)
    attributes = tuple((each.name, id(each.value), each.size) for each in _attributes(modules))
    buffers = (host_of(b) for module in modules for b in module._buffers.values() if b is not None)
    return (attributes, tuple((id(buffer), _version(buffer)) for buffer in buffers))


def _attributes(modules: Iterable[nn.Module]) -> Iterable[_Attribute]:
    for module in modules:
        for name, value in module.__dict__.items():
            if name not in _NOT_STATE:
                size = len(value) if isinstance(value, _CONTAINERS) else -1
                yield _Attribute(type(module).__name__, name, value, size)


def _buffers(modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    return [(id(b), _version(b)) for module in modules for b in module._buffers.values() if b is not None]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _foreign_draws() -> tuple[object, ...]:
    """States of generators that nobody restores."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return (random.getstate(), kind, keys.tobytes(), *rest)
