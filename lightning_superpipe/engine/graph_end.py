"""Hears of the end of a backward pass, whether it succeeds or raises."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch

__all__ = ["call_at_end"]


class GraphOwner(Protocol):
    """Who wants to know."""

    def end_graph(self, task: int) -> None:
        """A backward pass is over."""


def call_at_end(owner: GraphOwner, task: int) -> None:
    """Let ``owner.end_graph(task)`` run when the backward pass that the calling thread is running is over.

    It runs before ``backward()`` returns or raises to its caller, except that on a device with an autograd thread of
    its own that thread may still be unwinding when the exception arrives.
    """
    torch.autograd.Variable._execution_engine.queue_callback(_End(owner, task))


class _End:
    """Autograd calls it if the pass succeeds; if the pass raises, autograd drops it uncalled."""

    def __init__(self, owner: GraphOwner, task: int) -> None:
        self._owner = weakref.ref(owner)
        self._task = task
        self._is_over = False

    def __call__(self) -> None:
        self._is_over = True
        if (owner := self._owner()) is not None:
            owner.end_graph(self._task)

    def __del__(self) -> None:
        if not self._is_over:
            self()
