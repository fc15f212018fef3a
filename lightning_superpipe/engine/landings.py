"""Landings: host memory for gradients that cannot land where they stay, because they are to be cast or added."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from torch import Tensor

from lightning_superpipe.tiers import Slab, Tier

__all__ = ["Landing", "Landings"]


class Landing(NamedTuple):
    """Memory in which a gradient lands, shaped as the gradient."""

    slab: Slab
    tensor: Tensor


class Landings:
    """Exact-size memory for gradients that are cast or added once they have landed; as much as was ever in flight."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._free: defaultdict[int, list[Slab]] = defaultdict(list)

    def take(self, gradient: Tensor) -> Landing:
        """Return memory for one gradient; its contents are stale."""
        try:
            slab = self._free[gradient.nbytes].pop()
        except IndexError:
            slab = self._tier.allocate(gradient.nbytes)
        return Landing(slab, slab.carve(0, gradient))

    def give_back(self, landing: Landing) -> None:
        """Nobody reads the memory any more."""
        self._free[landing.slab.num_bytes].append(landing.slab)

    def clear(self) -> None:
        self._free.clear()
