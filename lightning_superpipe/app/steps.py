"""What a run is timed by: a callback that sees every training step end."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning as L
import torch

__all__ = ["StepClock"]


class StepClock(L.Callback):
    """Times of training steps, loading of their data included, and the last loss.

    A step ends where the next one begins, so validation does not count; the host need not wait for the device, which
    after some steps cannot fall behind any further.

    Args:
        num_warmup_steps: first steps, whose time does not count unless there are no others.
    """

    def __init__(self, num_warmup_steps: int = 3) -> None:
        self._num_warmup_steps = num_warmup_steps
        self._seconds: list[float] = []
        self._since: float | None = None
        self._loss: torch.Tensor | None = None

    @property
    def step_ms(self) -> float:
        """Median time of a step after warm-up, milliseconds."""
        return 1000 * median(self._seconds[self._num_warmup_steps :] or self._seconds or [float("nan")])

    @property
    def num_steps(self) -> int:
        """Steps that were timed, warm-up included."""
        return len(self._seconds)

    @property
    def loss(self) -> float:
        """Loss of the last step."""
        return float("nan") if self._loss is None else float(self._loss)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock where it stands."""
        self._since = time.perf_counter() if self._since is None else self._since

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Count the step."""
        now = time.perf_counter()
        self._seconds.append(now - (self._since or now))
        self._since = now
        self._loss = outputs["loss"] if isinstance(outputs, dict) else outputs

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock until the next step begins."""
        self._since = None

    def on_train_epoch_end(self, *_: Any) -> None:
        """Stop the clock until the next step begins."""
        self._since = None
