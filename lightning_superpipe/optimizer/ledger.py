"""The ledger of a step whose results go into files: what to take back if a part of it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.errors import TransferError
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.tiers import Tier

__all__ = ["Ledger"]


class Ledger:
    """One step of one optimizer, from its first part to its last.

    Where the tier can undo, a step that fails is undone as a whole: files show the bytes from before it, and all else
    that the step changed (anchors, counters) is put back. Whoever waits for a part is told once.

    Args:
        on_failed: called by whoever is told, before the error is raised.

    Attributes:
        lock: held by the caller's thread while it changes what :meth:`remember` has been told of.
    """

    def __init__(self, tier: Tier, on_failed: Callable[[], None]) -> None:
        self._tier, self._on_failed = tier, on_failed
        self.lock = threading.RLock()
        self._undos: list[Callable[[], None]] = []
        self._error: TransferError | None = None
        self._is_told = False

    @property
    def has_failed(self) -> bool:
        """Whether a part of the step has failed."""
        return self._error is not None

    @property
    def can_undo(self) -> bool:
        """Whether a step that fails is undone."""
        return self._tier.can_undo

    def note(self, undo: Callable[[], None]) -> None:
        """Something is about to change that the tier knows nothing of."""
        if self.can_undo:
            with self.lock:
                self._undos.append(undo)

    def remember(self, optimizer: Optimizer, some: Iterable[Member]) -> None:
        """Parameters that do not lie in files are about to change, and their states; both are copied."""
        if not self.can_undo:
            return
        with torch.no_grad():
            for _, parameter in some:
                self.note(partial(_put_back, parameter, parameter.detach().clone()))
                self.note(partial(_put_back_state, optimizer, parameter, _copied(optimizer.state.get(parameter, {}))))

    def fail(self, unit_name: str, error: BaseException) -> None:
        """A part could not be read, run or written: undo the step."""
        with self.lock:
            if self._error is not None:
                return
            if self._tier.can_undo:
                self.undo()
                left = "The step has been undone: weights and optimizer states are those of the last finished step"
            else:
                left = "Some units are updated and others not: weights are not those of a finished step"
            self._error = TransferError(
                f"the update of unit {unit_name!r} failed: {error}. {left}. Bring the disk in order, and go on from "
                "the last checkpoint" + (", or save one now." if self._tier.can_undo else ".")
            )
            self._error.__cause__ = error

    def undo(self) -> None:
        """Put everything back as it was before the step."""
        with self.lock, unfenced(), torch.no_grad():
            for undo in reversed(self._undos):
                undo()
            self._undos.clear()
            self._tier.undo()

    def commit(self) -> None:
        """All parts are done."""
        with self.lock:
            if self._error is None:
                self._undos.clear()
                self._tier.commit()

    def tell(self) -> None:
        """Raise what failed, once.

        Raises:
            TransferError: names the unit, and says what has become of the step.
        """
        if self._error is not None and not self._is_told:
            self._is_told = True
            self._on_failed()
            raise self._error


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state, each with a copy of its values where it is a tensor."""
    return {name: (value, value.clone() if isinstance(value, Tensor) else None) for name, value in state.items()}


def _put_back(tensor: Tensor, values: Tensor) -> None:
    tensor.detach().copy_(values)


def _put_back_state(optimizer: Optimizer, parameter: Tensor, copied: dict[str, Any]) -> None:
    state = optimizer.state[parameter]
    state.clear()
    for name, (value, values) in copied.items():
        if values is not None:
            value.copy_(values)
        state[name] = value
