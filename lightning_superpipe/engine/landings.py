"""Landings: host memory for gradients that cannot land where they stay, because they are to be cast or added."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.tiers import Tier

__all__ = ["Landings"]

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Landings:
    """Exact-size memory, used again: of each layout as much as was ever on its way together."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._free: defaultdict[_Layout, list[Tensor]] = defaultdict(list)

    def take(self, gradient: Tensor) -> Tensor:
        """Return memory shaped as a gradient; its contents are stale."""
        try:
            return self._free[_layout(gradient)].pop()
        except IndexError:
            with raw_tensors():  # backward may run under somebody's modes
                return self._tier.allocate(gradient.nbytes).carve(0, gradient)

    def give_back(self, landing: Tensor) -> None:
        """Nobody reads the memory any more."""
        self._free[_layout(landing)].append(landing)

    def clear(self) -> None:
        self._free.clear()


def _layout(tensor: Tensor) -> _Layout:
    return tensor.size(), tensor.stride(), tensor.dtype
