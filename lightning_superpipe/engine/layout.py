"""How a unit's tensors lie in one piece of memory."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from torch import nn

from lightning_superpipe.engine.slots import aligned
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.partition import is_streamable
from lightning_superpipe.tiers import Tier

__all__ = ["Home", "home_in", "lay_out", "slot_bytes_of", "trained_bytes_of"]


class Home(NamedTuple):
    """What of a unit moves into a tier.

    Attributes:
        stays: indices of the parameters that stay where they are.
        is_mostly_trained: more than half of its bytes are.
        num_bytes: of its slab; None where it needs none.
        changes: steps will write to the slab.
    """

    stays: set[int]
    is_mostly_trained: bool
    num_bytes: int | None
    changes: bool


def home_in(tier: Tier, parameters: Sequence[nn.Parameter]) -> Home:
    """What of a unit's parameters moves into a tier.

    Where the tier is files, what is trained in a mostly frozen unit stays in memory: files are then only read.
    """
    stays = {index for index, parameter in enumerate(parameters) if not tier.takes(parameter)}
    trained = {index for index, parameter in enumerate(parameters) if parameter.requires_grad}
    num_trained_bytes = sum(parameters[index].nbytes for index in trained)
    is_mostly_trained = 2 * num_trained_bytes > sum(parameter.nbytes for parameter in parameters)
    if not tier.is_memory and not is_mostly_trained:
        stays |= trained
    is_needed = not parameters or len(stays) < len(parameters)
    num_bytes = lay_out(parameters)[1] if is_needed else None
    return Home(stays, is_mostly_trained, num_bytes, changes=bool(trained - stays))


def lay_out(parameters: Sequence[nn.Parameter], wire: Wire | None = None) -> tuple[list[int], int]:
    """Aligned byte offsets of tensors packed one after the other, and the bytes of all; on the host, or as ``wire``."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        num_bytes = parameter.nbytes if wire is None else wire.num_bytes(parameter)
        end += aligned(num_bytes)
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
