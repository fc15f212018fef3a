"""Saved-tensor tokens: autograd never owns slot memory.

What autograd saves inside a unit call passes through here. A tensor that lies in a slot becomes a token (unit, dtype,
shape, strides, offset); unpacking the token in backward loads the unit, on demand if no prefetch did, and rebuilds the
view. Prefetching is therefore only a hint.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import hooks_are_allowed, raw_tensors, storage_address
from lightning_superpipe.engine.casts import Casts, Conversion
from lightning_superpipe.engine.slots import SlotPool
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.engine.wire import Wire

__all__ = ["SavedTensors", "TokenHost"]

_VIEWS = "T Transpose Permute View UnsafeView Unsqueeze Squeeze Expand Select Slice Split SplitWithSizes Unbind"
_VIEW_NODES = frozenset(f"{name}Backward{version}" for name in _VIEWS.split() for version in (0, 1))
_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "parameter {index} of unit {unit!r} changed between forward and backward"
)


class _Part(NamedTuple):
    """A view of a parameter; the offset is in elements."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        return parameter.as_strided(self.size, self.stride, parameter.storage_offset() + self.offset)


class Token(NamedTuple):
    """What autograd keeps instead of a view of slot memory.

    Attributes:
        versions: of the host parameter and of its twin, when saved.
        offset: bytes from the start of the parameter, or of its cast.
        position: of the parameter in its unit.
        cast: the saved tensor was a view of this part of the parameter, converted; None: of the parameter itself.
    """

    unit: weakref.ref[Unit]
    unit_name: str
    position: int
    parameter: nn.Parameter
    versions: tuple[int, int]
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    cast: _Part | None


class _Below(NamedTuple):
    """Something packed by the pair of hooks below ours (a user's checkpoint, ``save_on_cpu``)."""

    packed: Any


class TokenHost(Protocol):
    """What tokens need of the engine."""

    @property
    def is_open(self) -> bool:
        """Whether units can still be loaded."""

    device: torch.device
    wire: Wire
    slots: SlotPool
    units: list[Unit]
    casts: Casts
    lone_dtype: torch.dtype | None

    def use_in_backward(self, unit: Unit) -> None:
        """Make sure that the unit is loaded, has arrived and is bound."""

    def unit_of_twin(self, tensor: Tensor) -> tuple[Unit, int] | None:
        """The unit and index of a twin; None for any other tensor."""

    def note_saved(self, tensor: Tensor) -> None:
        """A tensor that is no weight is saved."""


class SavedTensors:
    """The pair of hooks around each unit call. Graphs hold it, so it holds the engine weakly."""

    def __init__(self, host: TokenHost) -> None:
        self._host = weakref.ref(host)
        self._device, self._wire = host.device, host.wire

    def is_innermost(self) -> bool:
        """Whether autograd asks this pair of hooks now."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and getattr(top[0], "__self__", None) is self

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Turn slot tensors saved inside into tokens; leave all others to the pair of hooks below.

        Autograd asks the innermost pair only: without handing on, a user's checkpoint around units would be defeated
        silently (test_checkpoint_keeps_its_memory_saving).
        """
        if self.is_innermost() or not hooks_are_allowed():
            yield
            return
        below = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack, unpack = (self._pack, self._unpack) if below is None else self._composed(*below)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _composed(
        self, pack_below: Callable[[Tensor], Any], unpack_below: Callable[[Any], Any]
    ) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
        def pack(tensor: Tensor) -> Any:
            packed = self._pack(tensor)
            return packed if isinstance(packed, Token) else _Below(pack_below(tensor))

        def unpack(packed: Any) -> Any:
            return unpack_below(packed.packed) if isinstance(packed, _Below) else self._unpack(packed)

        pack.__self__ = self  # type: ignore[attr-defined]  # recognised by a nested unit call
        return pack, unpack

    # -- packing

    def _pack(self, tensor: Tensor) -> Any:
        host = self._host()
        if host is None:
            return tensor
        place = self._place(host, tensor)
        if place is None:
            token = self._cast_token(host, tensor)
            if token is None:
                host.note_saved(tensor)
            return token or tensor
        unit, index, offset = place
        return self._token(unit, index, tensor, offset, cast=None)

    def _place(self, host: TokenHost, tensor: Tensor) -> tuple[Unit, int, int] | None:
        """The unit, the parameter and the byte offset in it that a tensor in a slot shows."""
        slot = host.slots.of(tensor)
        if slot is None:
            return None
        assert slot.tenant is not None, "a tensor of an empty slot was saved"
        unit = host.units[slot.tenant]
        offset = tensor.data_ptr() - slot.address if tensor.numel() else 0
        index = bisect_right(unit.offsets, offset) - 1
        return unit, index, offset - unit.offsets[index]

    def _cast_token(self, host: TokenHost, tensor: Tensor) -> Token | None:
        """Recognise a view of a twin that autocast has converted: keeping it would keep the model on the device."""
        if tensor.dtype is host.lone_dtype:
            return None  # a conversion to the dtype that all weights have is none
        if tensor.device.type != self._device.type or (address := storage_address(tensor)) is None:
            return None
        if (conversion := host.casts.watched.get(address)) is not None:
            return self._watched_token(host, tensor, conversion)
        node = _before_views(tensor.grad_fn)
        if node is None or node.name() != "ToCopyBackward0":
            return None
        source: Tensor | None = getattr(node.next_functions[0][0], "variable", None)
        if source is None:  # perhaps a part of a weight; which one, the graph does not tell
            leaf = getattr(_before_views(node.next_functions[0][0]), "variable", None)
            if leaf is not None and (owner := host.unit_of_twin(leaf)) is not None:
                host.casts.watch_from_now_on(owner[0])
            return None
        owner = host.unit_of_twin(source)
        if owner is None or tensor.untyped_storage().nbytes() != source.numel() * tensor.itemsize:
            return None
        unit, index = owner
        host.casts.note(unit, index, tensor)
        whole = _Part(source.size(), source.stride(), 0)
        return self._token(unit, index, tensor, int(tensor.storage_offset()) * tensor.itemsize, cast=whole)

    def _watched_token(self, host: TokenHost, tensor: Tensor, conversion: Conversion) -> Token | None:
        source, result = conversion
        place = self._place(host, source)
        if place is None or tensor.dtype is not result.dtype:
            return None
        unit, index, offset = place
        if source.numel() == unit.parameters[index].numel():
            host.casts.note(unit, index, tensor)
        part = _Part(source.size(), source.stride(), offset // source.itemsize)
        return self._token(unit, index, tensor, int(tensor.storage_offset()) * tensor.itemsize, cast=part)

    def _token(self, unit: Unit, index: int, tensor: Tensor, offset: int, *, cast: _Part | None) -> Token:
        parameter = unit.parameters[index]
        versions = (parameter._version, unit.twin(index)._version)
        size, stride = tensor.size(), tensor.stride()
        return Token(weakref.ref(unit), unit.name, index, parameter, versions, tensor.dtype, size, stride, offset, cast)

    # -- unpacking

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, Token):
            return packed  # type: ignore[no-any-return]
        unit, host = packed.unit(), self._host()
        if unit is None or host is None or not host.is_open:
            return self._rebuild(packed)
        if packed.position >= len(unit.parameters) or unit.parameters[packed.position] is not packed.parameter:
            raise RuntimeError(
                f"parameter {packed.position} of unit {packed.unit_name!r} was replaced between forward and backward."
            )
        if packed.versions != (packed.parameter._version, unit.twin(packed.position)._version):
            raise RuntimeError(_MODIFIED.format(index=packed.position, unit=packed.unit_name))
        host.use_in_backward(unit)
        assert unit.slot is not None, "a unit in use has a slot"
        if packed.cast:
            return _view_of_cast(unit.twin(packed.position).detach(), packed)
        if packed.position in unit.has_own_storage:
            return _view_of(unit.twin(packed.position).detach(), packed)
        offset = unit.offsets[packed.position] + packed.offset
        return unit.slot.view(packed.dtype, offset, packed.size, packed.stride)

    def _rebuild(self, token: Token) -> Tensor:
        """The engine is gone (backward after teardown): read the host parameter."""
        with raw_tensors():
            here = self._wire.converted(token.parameter.data).to(self._device)
            return _view_of_cast(here, token) if token.cast else _view_of(here, token)


def _before_views(node: Any) -> Any:
    """The node that made the tensor of which views were taken."""
    while node is not None and node.name() in _VIEW_NODES:
        node = node.next_functions[0][0]
    return node


def _view_of(parameter: Tensor, token: Token) -> Tensor:
    start = parameter.storage_offset() * parameter.itemsize + token.offset
    return parameter.view(token.dtype).as_strided(token.size, token.stride, start // token.dtype.itemsize)


def _view_of_cast(parameter: Tensor, token: Token) -> Tensor:
    assert token.cast is not None, "a token of a view, not of a cast"
    with torch.no_grad():
        return (
            token.cast.of(parameter)
            .to(token.dtype)
            .as_strided(token.size, token.stride, token.offset // token.dtype.itemsize)
        )
