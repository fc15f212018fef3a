"""Class swap: a streamed module gets a dynamic subclass of its own class, whose ``__call__`` asks its owner first.

Compared with forward hooks the wrapper sits outside all user hooks, covers every exception, leaves ``_forward_hooks``
empty (fast paths ask for that) and vanishes from copies: deepcopy and pickle give modules of the original class with
host parameters. ``type(m) is X`` is False while the swap lasts; ``isinstance`` holds.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_superpipe.errors import UnsupportedError

__all__ = ["Owner", "owner_of", "refuse_streamed", "swap_in", "swap_out"]

_OWNER = "_superpipe_owner"
_BASE = "_superpipe_base"


class Owner(Protocol):
    """Who decides what happens around a swapped module's calls."""

    device: torch.device

    def owns(self, module: nn.Module) -> bool:
        """Whether the module itself is meant: copies of its ``__dict__`` carry the owner to strangers."""

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module's own ``__call__``, given as ``forward``."""

    def generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own ``generate``, where it has one."""

    def unwatched(self) -> AbstractContextManager[None]:
        """Scope in which reading host parameters is nobody's business."""

    def host_state(self, module: nn.Module) -> dict[str, Any]:
        """The module's ``_parameters`` and ``_buffers`` as they are on the host, whatever is bound now."""


def owner_of(module: nn.Module) -> Owner | None:
    """The owner of a swapped module; None for all other modules."""
    owner: Owner | None = module.__dict__.get(_OWNER)
    return owner if owner is not None and owner.owns(module) else None


def swap_in(module: nn.Module, owner: Owner) -> None:
    """Give a module the streamed form of its class, or just another owner if it has it already."""
    module.__dict__[_OWNER] = owner
    if not hasattr(type(module), _BASE):
        base: Any = type(module)
        module.__class__ = _streamed_class(base)


def swap_out(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__dict__.pop(_OWNER, None)
    swapped = type(module)
    if _BASE in swapped.__dict__:
        module.__class__ = swapped.__dict__[_BASE]
    elif hasattr(swapped, _BASE):
        # Somebody (parametrize) has subclassed ours meanwhile: cut ours out of its bases.
        swapped.__bases__ = tuple(base.__dict__.get(_BASE, base) for base in swapped.__bases__)


class _Quiet:
    """Keeps the user's class from hearing of our subclass: some classes register all that derive from them."""

    def __init_subclass__(cls, **options: Any) -> None:
        if _BASE not in cls.__dict__:
            super().__init_subclass__(**options)


@functools.cache
def _streamed_class(base: Any) -> Any:
    """The streamed form of a module class; one per class, so that isinstance and caches by type keep working."""
    swapped: Any = None

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = super(swapped, self).__call__
        owner = owner_of(self)
        return forward(*args, **kwargs) if owner is None else owner.call(self, forward, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _reduce_as(base, self, super(swapped, self).__reduce_ex__(protocol))

    def _save_to_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        owner = owner_of(self)
        with nullcontext() if owner is None else owner.unwatched():
            super(swapped, self)._save_to_state_dict(*args, **kwargs)

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        kept = fn if owner_of(self) is None else _keeping_device(fn)
        return super(swapped, self)._apply(kept, *args, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        # Dynamo must not trace the loader; what is compiled is the module's own forward, inside.
        "__call__": torch.compiler.disable(__call__),  # type: ignore[no-untyped-call]
        "__reduce_ex__": __reduce_ex__,
        "_apply": _apply,
        "_save_to_state_dict": _save_to_state_dict,
        _BASE: base,
    }
    if callable(getattr(base, "generate", None)):
        namespace["generate"] = _generating(base.generate)
    if isinstance(getattr(base, "device", None), property):
        namespace["device"] = _device_property(base.device)
    swapped = types.new_class(base.__name__, (_Quiet, base), {}, lambda body: body.update(namespace))
    return swapped


def _generating(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the owner know that the calls to come are those of one generation."""

    @functools.wraps(original)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own, owner = functools.partial(original, self), owner_of(self)
        return own(*args, **kwargs) if owner is None else owner.generate(own, args, kwargs)

    return generate


def _device_property(original: property) -> property:
    """Let ``module.device`` tell where the module computes: transformers reads its first parameter, which is home."""

    def device(self: nn.Module) -> torch.device:
        owner = owner_of(self)
        if owner is not None:
            return owner.device
        assert original.fget is not None
        where: torch.device = original.fget(self)
        return where

    return property(device, original.fset, original.fdel)


def _keeping_device(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let ``module.to(...)`` change the dtype of host tensors, but not fetch the model onto the device for good."""

    def kept(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        moved = tensor.device.type == "cpu" and result.device.type not in ("cpu", "meta")
        return result.to("cpu") if moved else result

    return kept


def _reduce_as(base: type[nn.Module], module: nn.Module, reduced: Any) -> Any:
    """Rewrite what pickle and deepcopy are told: the original class, host tensors, no owner."""
    if not isinstance(reduced, tuple):
        return reduced
    make, args, state, *rest = (*reduced, None)[: max(len(reduced), 3)]
    # pickle insists that __newobj__ gets the object's own class, so the plain constructor stands in for it.
    make = object.__new__ if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
    args = tuple(base if arg is type(module) else arg for arg in args)
    if isinstance(state, dict):
        owner = owner_of(module)
        state = {key: value for key, value in state.items() if key != _OWNER}
        if owner is not None:
            state.update(owner.host_state(module))
    return (make, args, state, *rest)


def refuse_streamed(root: nn.Module) -> None:
    """Raise for a module that streams already: two engines would bind the same modules, each over the other's copies.

    Raises:
        UnsupportedError: it does, or a part of it.
    """
    name = next((name for name, module in root.named_modules() if owner_of(module) is not None), None)
    if name is not None:
        part = f"its part {name!r}" if name else f"this {type(root).__name__}"
        raise UnsupportedError(
            f"the model streams already ({part}): end that first, by pipe.close(), accelerator.free_memory(), "
            "fabric.strategy.teardown() or the end of the Trainer's run."
        )
