"""Who holds a tensor: owners in C++, and the Python references that graphs add."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import raw_tensors

__all__ = ["graph_reference", "num_owners"]


def num_owners(tensor: Tensor) -> int:
    """How many owners the tensor itself (not its storage) has in C++."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


@cache
def graph_reference() -> int:
    """Python references that a parameter gains by being used in a graph (depends on torch's object model)."""
    with raw_tensors():
        box = [nn.Parameter(torch.zeros(1))]
    before = sys.getrefcount(box[0])
    with torch.inference_mode(False), torch.enable_grad():
        graph = box[0] * 2.0
    gained = sys.getrefcount(box[0]) - before
    del graph
    return gained
