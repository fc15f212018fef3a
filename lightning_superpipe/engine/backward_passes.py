"""Backward passes that somebody's loop calls: who is told that one begins, and that the device had no room for it.

A kernel that finds no memory raises from ``loss.backward()``, with nothing of ours on the call stack, and autograd has
no hook for a pass that fails. So ``torch.autograd.backward``, which all of ``Tensor.backward``, Accelerate and Fabric
call, is wrapped as long as somebody listens.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch

from lightning_superpipe.engine.backend import graph_task_id
from lightning_superpipe.engine.shortage import OutOfDeviceMemory

__all__ = ["BackwardListener", "listen", "stop_listening"]


class BackwardListener(Protocol):
    """Who wants to know."""

    def begin_pass(self) -> None:
        """A backward pass begins, of whatever graph."""

    def fail_pass(self, reason: str) -> str:
        """The device had no room for it; return what to say, nothing where the pass is none of the listener's."""


_backward = torch.autograd.backward
_listeners: weakref.WeakSet[BackwardListener] = weakref.WeakSet()  # a session that nobody closes is collected as well


@functools.wraps(_backward)
def _announced_backward(*args: Any, **kwargs: Any) -> None:
    if not _listeners or graph_task_id() != -1:  # reentrant checkpoints run passes inside passes
        return _backward(*args, **kwargs)
    listeners = list(_listeners)
    for listener in listeners:
        listener.begin_pass()
    try:
        _backward(*args, **kwargs)
    except OutOfDeviceMemory:
        raise
    except torch.OutOfMemoryError as error:
        said = [words for listener in listeners if (words := listener.fail_pass(str(error)))]
        if not said:
            raise
        raise OutOfDeviceMemory(" ".join(said)) from error


def listen(listener: BackwardListener) -> None:
    """Tell a listener of all backward passes from now on."""
    _listeners.add(listener)
    if torch.autograd.backward is _backward:
        torch.autograd.backward = _announced_backward


def stop_listening(listener: BackwardListener) -> None:
    """Tell it of no more; torch is as it was once nobody listens."""
    _listeners.discard(listener)
    if not _listeners and torch.autograd.backward is _announced_backward:
        torch.autograd.backward = _backward
