"""Chains under a policy for activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_superpipe.engine.activations import Choice, Policy
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from tests.engine.tiny import CPU, Chain, Result, batches, open_engine, train

__all__ = ["NUM_BLOCKS", "choices", "made_of", "stream"]

NUM_BLOCKS = 5


def choices(policy: Policy, num_units: int = NUM_BLOCKS, *, is_explicit: bool = False) -> list[Choice]:
    return [Choice(policy, is_explicit)] * num_units


def stream(module: Chain, policy: Policy, *, is_explicit: bool = False, num_batches: int = 2, **window: Any) -> Result:
    """Train a chain with late copies; an unexpected warning is an error."""
    lanes = ThreadLanes(CPU, None, max_delay_ms=0.5)
    picked = choices(policy, len(module.blocks), is_explicit=is_explicit)
    with open_engine(module, lanes, choices=picked, **window) as engine:
        return train(module, batches(num_batches), partial(engine.step, "train"))


def made_of(kind: Callable[[], nn.Module]) -> Chain:
    """Return three plain blocks with one of a kind in the middle; the same weights each time."""
    torch.manual_seed(0)
    module = Chain(3, dropout=0.1)
    module.blocks[1] = kind()
    return module
