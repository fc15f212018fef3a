"""Files whose reads or writes begin late."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from torch import Tensor

from lightning_superpipe.tiers.disk import DiskSlab

__all__ = ["hold"]


def hold(patch: pytest.MonkeyPatch, name: str, wait: Callable[[int], object]) -> None:
    """Let each ``"fetch"`` or ``"store"`` begin when ``wait``, which is told how many went before, returns."""
    original, numbers = getattr(DiskSlab, name), itertools.count()

    def late(self: DiskSlab, memory: Tensor) -> None:
        wait(next(numbers))
        original(self, memory)

    patch.setattr(DiskSlab, name, late)
