"""Steps of a run that streams no more, because all of it fits; if the device runs out of memory, it streams again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.repeat import Notes, repeated_if_too_large
from lightning_superpipe.guard import OrdinaryGuard
from lightning_superpipe.session import OutOfDeviceMemory, Session

__all__ = ["OrdinarySteps", "ordinary_steps"]

_Result = TypeVar("_Result")


def ordinary_steps(
    session: Session,
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    is_safe: Callable[[], bool],
    stream_again: Callable[[], Session],
    tell: Callable[[str], None],
) -> OrdinarySteps | None:
    """Let the ordinary run go on if all of it fits on the device; None if streaming does.

    Args:
        session: of the module, between two steps.
        is_safe: see :meth:`Session.steps_aside`.
        stream_again, tell: see :class:`OrdinarySteps`.
    """
    try:
        if not session.steps_aside(is_safe=is_safe):
            return None
    except OutOfDeviceMemory as error:
        stream_again()
        tell(f"superpipe: not all that was to fit on the device had room there ({error.__cause__}): streaming goes on.")
        return None
    return OrdinarySteps(OrdinaryGuard(root, session.device, optimizers), stream_again, tell)


class OrdinarySteps:
    """Runs whole steps of the ordinary run.

    Args:
        guard: of the module, which is on the device.
        stream_again: brings it home and opens a session for it.
        tell: says something to the user.
    """

    def __init__(self, guard: OrdinaryGuard, stream_again: Callable[[], Session], tell: Callable[[str], None]) -> None:
        self._guard, self._stream_again, self._tell = guard, stream_again, tell

    def call(self) -> AbstractContextManager[None]:
        """Scope of one call of the model in training."""
        return self._guard.call(trains=True)

    def run(self, step: Callable[[], _Result], notes: Callable[[], Notes]) -> _Result:
        """Run a step; where the device had no room for it, undo it, stream from now on, and repeat it.

        Args:
            step: forward and backward; what it returns is given back.
            notes: notes what the loop knows now.

        Raises:
            OutOfDeviceMemory: streaming has no room either, or the step cannot be repeated exactly.
        """
        guard = self._guard
        guard.attempts.begin()
        guard.is_repeated, before = True, notes()
        try:
            return step()
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself holds the step's frames, and with them its activations
        finally:
            guard.is_repeated = False
        before.restore()
        undone = guard.undo()
        self.close()
        session = self._stream_again()
        undone.require_repeatable(reason)
        self._tell(f"superpipe: the device ran out of memory: {reason} The run streams again and repeats the step.")
        return repeated_if_too_large(session, step, notes)

    def close(self) -> None:
        """Nothing follows."""
        self._guard.close()
