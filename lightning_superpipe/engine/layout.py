"""How a unit's tensors lie in one piece of memory."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn

from lightning_superpipe.engine.slots import ALIGNMENT
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.partition import is_streamable

__all__ = ["lay_out", "slot_bytes_of", "trained_bytes_of"]


def lay_out(parameters: Sequence[nn.Parameter], wire: Wire | None = None) -> tuple[list[int], int]:
    """Aligned byte offsets of tensors packed one after the other, and the bytes of all; on the host, or as ``wire``."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        num_bytes = parameter.nbytes if wire is None else wire.num_bytes(parameter)
        end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def slot_bytes_of(
    module: nn.Module, anchors: Container[int], wire: Wire | None = None, *, is_abstract: bool = False
) -> int:
    """Bytes of the slot that a module needs as a unit."""
    return lay_out(_streamed(module, anchors, is_abstract), wire)[1]


def trained_bytes_of(
    module: nn.Module, anchors: Container[int], wire: Wire | None = None, *, is_abstract: bool = False
) -> int:
    """Bytes of the gradients that a module makes as a unit."""
    return lay_out([p for p in _streamed(module, anchors, is_abstract) if p.requires_grad], wire)[1]


def _streamed(module: nn.Module, anchors: Container[int], is_abstract: bool) -> list[nn.Parameter]:
    return [p for p in module.parameters() if id(p) not in anchors and is_streamable(p, is_abstract=is_abstract)]
