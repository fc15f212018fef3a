"""What becomes of a step that the device had no room for: it is undone, then repeated by whoever can, or refused.

Lightning's automatic optimization and the Trainer of transformers hand over whole steps, so their adapters repeat them
under a smaller plan. In all other loops the batch is the loop's own: it meets :class:`OutOfDeviceMemory` in place of
torch's error, and may repeat the step itself, because all is as it was before it.
"""

from __future__ import annotations

import abc
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_superpipe.engine.backward_passes import listen, stop_listening
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.optimizer import UpdateStage
from lightning_superpipe.rewind import Attempts, OutOfDeviceMemory, Undone
from lightning_superpipe.tuning import Tuner

__all__ = ["OrdinaryGuard", "StepGuard"]

_PASSES = {"F": "the forward", "B": "the backward"}


class LoopGuard(abc.ABC):
    """Hears of one module's training steps, whoever runs them, so that one without room can be undone.

    Attributes:
        attempts: what was before.
        is_repeated: whoever runs the steps repeats them, and asks for it.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        self.attempts = Attempts(root, device)
        self.is_repeated = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def watch(self) -> None:
        """Hear of backward passes and optimizer steps from now on, whoever runs them."""
        listen(self)
        guard = weakref.ref(self)

        def after(optimizer: Optimizer, *_: object) -> None:
            if (own := guard()) is not None and own.is_own(optimizer):
                own.attempts.end()

        self._hook = register_optimizer_step_post_hook(after)

    @abc.abstractmethod
    def is_own(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's step ends one of the module's."""

    @abc.abstractmethod
    def refuse(self, reason: str = "", *, trains: bool = True) -> str:
        """The device had no room for a step that is not ours to repeat: undo it, and return what to say.

        Args:
            reason: what the device said.
            trains: it was a training step; others change nothing that could be undone.
        """

    @contextlib.contextmanager
    def call(self, *, trains: bool) -> Iterator[None]:
        """Scope of one call of the model."""
        if trains and not self.is_repeated:
            self.attempts.begin()
        try:
            yield
        except OutOfDeviceMemory:
            raise
        except torch.OutOfMemoryError as error:
            if self.is_repeated:
                raise
            raise OutOfDeviceMemory(self.refuse(str(error), trains=trains)) from error

    def begin_pass(self) -> None:
        """A backward pass begins, see :class:`BackwardListener`."""
        self.attempts.note_backward()

    def fail_pass(self, reason: str) -> str:
        """There was no room for it, see :class:`BackwardListener`."""
        return self.refuse(reason) if self.attempts.is_open and not self.is_repeated else ""

    def close(self) -> None:
        """Hear of nothing more."""
        stop_listening(self)
        if self._hook is not None:
            self._hook.remove()


class OrdinaryGuard(LoopGuard):
    """Undoes steps of a run that streams no more, because all of it fits.

    Args:
        optimizers: of the module.
    """

    def __init__(self, root: nn.Module, device: torch.device, optimizers: Iterable[Optimizer]) -> None:
        super().__init__(root, device)
        self._optimizers = list(optimizers)
        self.watch()

    def is_own(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's step ends one of the module's."""
        return any(optimizer is own for own in self._optimizers)

    def undo(self) -> Undone:
        """A batch has failed: let all be as before it, or as before the whole step where it cannot be run again."""
        return self.attempts.restore([], whole_step=False)

    def refuse(self, reason: str = "", *, trains: bool = True) -> str:
        """Undo the step, and return what to say."""
        if trains:
            self.attempts.restore([], whole_step=True)
        return (
            "the device ran out of memory in a step that did not stream, because all of it had fitted before: "
            f"{reason} Weights, buffers, states and random numbers are those of the last finished step, gradients are "
            "gone. Take a smaller batch, or set step_aside=False."
        )


class StepGuard(LoopGuard):
    """Undoes steps of one session.

    Args:
        updates: the stage that splits optimizer steps; None where they stay whole.
        drop_step: closes what the session has open of the step in progress, which then counts as not begun.
    """

    def __init__(
        self,
        root: nn.Module,
        engine: Engine,
        updates: UpdateStage | None,
        tuner: Tuner,
        drop_step: Callable[[], int],
    ) -> None:
        super().__init__(root, engine.device)
        self._engine, self._updates, self._tuner, self._drop_step = engine, updates, tuner, drop_step

    def is_own(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's step ends one of the module's; one that nobody knows may."""
        written = self._engine.catalog.written_by(optimizer)
        return written is None or bool(written)

    def fall_back(self, reason: str) -> None:
        """The device had no room for the step that was attempted: undo it, and take the next smaller plan.

        Args:
            reason: what the device said.

        Raises:
            OutOfDeviceMemory: there is none, or the step cannot be repeated exactly.
        """
        where = self._where()
        num_steps, undone = self._undo(whole_step=False)
        undone.require_repeatable(reason)
        self._tuner.fall_back(num_steps, reason, where)

    def refuse(self, reason: str = "", *, trains: bool = True) -> str:
        """Undo the step, and return what to say; the next one gets a smaller plan."""
        where = self._where()
        if not trains:
            return self._tuner.refusal(reason, where, None)
        num_steps, _ = self._undo(whole_step=True)
        return self._tuner.refusal(reason, where, num_steps)

    def _where(self) -> str:
        """The use of a unit that came last, in words."""
        if self._engine.probes.last_use is None:
            return ""
        name, unit = self._engine.probes.last_use
        return f"{_PASSES[name]} of unit {unit.name!r} ({unit.num_bytes} bytes of weights)"

    def _undo(self, *, whole_step: bool) -> tuple[int, Undone]:
        """What was attempted has failed: let all be as before it; return the number of steps that have begun."""
        updated = self._updates.suspend() if self._updates is not None else []
        num_steps = self._drop_step()
        undone = self.attempts.restore(updated, whole_step=whole_step)
        self._engine.invalidate()
        return num_steps, undone
