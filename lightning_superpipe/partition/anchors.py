"""Which parameters get a permanent copy on the device instead of streaming, and which models are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.errors import UnsupportedError

__all__ = ["find_anchors", "is_dense", "is_lazy", "is_streamable", "num_bytes", "refuse_unsupported"]

SHARED = "shared by units"  # used by two units, or by a unit and the rest of the model: tied weights
OUTSIDE = "outside units"  # owned by a module that no unit contains
SCRIPTED = "scripted"  # a ScriptModule takes no other tensor in place of its own
SHARES_STORAGE = "shares storage"  # a write to it shows in another tensor of the model: copies would not

_META = "meta"

# What the tensor itself is, first match. Streaming swaps an ordinary Parameter of the same sizes and strides in.
_OBSTACLES: dict[str, Callable[[Tensor], bool]] = {
    "lazy": lambda tensor: is_lazy(tensor),
    _META: lambda tensor: tensor.device.type == "meta",
    "tensor subclass": lambda tensor: type(tensor) is not nn.Parameter,
    "sparse": lambda tensor: tensor.layout is not torch.strided,
    "not a leaf": lambda tensor: not tensor.is_leaf,
    "not dense": lambda tensor: not is_dense(tensor),
}

# Recognised by name, so that nothing is imported for it.
_QUANTIZED_CLASSES = {"Params4bit", "Int8Params"}  # bitsandbytes
_QUANTIZED_PACKAGES = {"torchao"}
_NARROW_DTYPES = ("torch.float8_", "torch.float4_")


def is_streamable(parameter: Tensor, *, is_abstract: bool = False) -> bool:
    """Tell whether the tensor itself may stream; who uses it is another question (`find_anchors`).

    Args:
        is_abstract: tensors of the meta device count as those that will take their place.

    >>> is_streamable(nn.Parameter(torch.ones(3, 2))), is_streamable(nn.Parameter(torch.ones(3, 4)[:, :2]))
    (True, False)
    """
    return _obstacle(parameter, is_abstract) is None


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill one range of memory without holes or overlaps, in any order of dimensions.

    Conjugate and negative views are not dense: their memory holds other numbers than they show.

    >>> is_dense(torch.ones(2, 3).t()), is_dense(torch.ones(1, 3).expand(2, 3)), is_dense(torch.ones(0, 3))
    (True, False, True)
    """
    if tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_lazy(tensor: Tensor) -> bool:
    """Tell whether the tensor has no sizes before the first batch."""
    return bool(nn.parameter.is_lazy(tensor))


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; none yet if it is lazy.

    >>> num_bytes(torch.ones(3, 2)), num_bytes(nn.UninitializedParameter())
    (24, 0)
    """
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def refuse_unsupported(root: nn.Module) -> None:
    """Raise UnsupportedError if a parameter has a form whose bytes cannot be copied and trained as they are."""
    for name, parameter in root.named_parameters():
        kind = type(parameter)
        if parameter.layout is not torch.strided:
            raise UnsupportedError(
                f"parameter {name!r} is sparse ({parameter.layout}): only dense weights can be streamed. Make it "
                "dense (.to_dense()) before training; sparse gradients of dense weights are no problem."
            )
        if (
            parameter.is_quantized
            or str(parameter.dtype).startswith(_NARROW_DTYPES)
            or kind.__name__ in _QUANTIZED_CLASSES
            or kind.__module__.partition(".")[0] in _QUANTIZED_PACKAGES
        ):
            raise UnsupportedError(
                f"parameter {name!r} is quantised ({kind.__name__}, {parameter.dtype}): streaming moves plain numbers "
                "of at least 16 bits or integers, without scales. Load the model in bfloat16, float16 or float32."
            )


def find_anchors(root: nn.Module, units: Sequence[nn.Module], *, is_abstract: bool = False) -> dict[int, str]:
    """Return the parameters that do not stream: ``id(parameter)`` -> reason.

    Args:
        root: the whole model.
        units: modules inside it, none inside another.
        is_abstract: see :func:`is_streamable`.
    """
    uses, scripted = _uses(root, units)
    overlapping = _overlapping(chain(root.parameters(), root.buffers()))
    anchors = {}
    for parameter in root.parameters():
        key = id(parameter)
        reason = _obstacle(parameter, is_abstract)
        if reason is None and key in scripted:
            reason = SCRIPTED
        if reason is None and key in overlapping:
            reason = SHARES_STORAGE
        if reason is None and len(uses[key]) > 1:
            reason = SHARED
        if reason is None and None in uses[key]:
            reason = OUTSIDE
        if reason is not None:
            anchors[key] = reason
    return anchors


def _obstacle(parameter: Tensor, is_abstract: bool) -> str | None:
    """Return what about the tensor itself keeps it from streaming, or None."""
    found = (reason for reason, applies in _OBSTACLES.items() if applies(parameter))
    return next((reason for reason in found if not (is_abstract and reason == _META)), None)


def _uses(root: nn.Module, units: Sequence[nn.Module]) -> tuple[dict[int, set[int | None]], set[int]]:
    """Return the units that use each parameter (None: the rest of the model), and the parameters of ScriptModules.

    An alias of a module inside a unit (``self.body = self.net.body``) is no use by the rest: a call through it enters
    the unit all the same.
    """
    uses: dict[int, set[int | None]] = {}
    scripted: set[int] = set()
    inside: set[int] = set()

    def note(module: nn.Module, user: int | None) -> None:
        for parameter in module.parameters(recurse=False):
            uses.setdefault(id(parameter), set()).add(user)
            if isinstance(module, torch.jit.ScriptModule):
                scripted.add(id(parameter))

    for index, unit in enumerate(units):
        for module in unit.modules():
            inside.add(id(module))
            note(module, index)
    for module in root.modules():
        if id(module) not in inside:
            note(module, None)
    return uses, scripted


class _Extent(NamedTuple):
    """The range of memory that a tensor reaches, and the tensor's id."""

    device: str
    start: int
    end: int
    key: int


def _overlapping(tensors: Iterator[Tensor]) -> set[int]:
    """Return ids of the tensors whose memory overlaps another's; neighbours in one storage do not overlap."""
    distinct = {id(tensor): tensor for tensor in tensors if _has_memory(tensor)}
    extents = sorted(_extent(tensor) for tensor in distinct.values())
    found: set[int] = set()
    furthest: _Extent | None = None  # of those seen, the one that reaches furthest
    for extent in extents:
        if furthest is not None and furthest.device == extent.device:
            if extent.start < furthest.end:
                found |= {extent.key, furthest.key}
            if extent.end <= furthest.end:
                continue
        furthest = extent
    return found


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether the tensor is an ordinary one with elements at an address."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return ordinary and tensor.device.type != "meta" and tensor.numel() > 0


def _extent(tensor: Tensor) -> _Extent:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Extent(str(tensor.device), start, start + reach * tensor.element_size(), id(tensor))
