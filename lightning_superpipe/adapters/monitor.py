"""A Lightning callback that sends what streaming does, and how fast training is, to whatever logger is set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch.utils._pytree import tree_iter

from lightning_superpipe.adapters.strategy import SuperpipeMixin
from lightning_superpipe.observe.report import Report, StepCounters

__all__ = ["SuperpipeMonitor", "num_samples_by_shape", "num_tokens_by_shape"]

_NUM_TOKEN_DIMENSIONS = 2  # samples, tokens


class SuperpipeMonitor(L.Callback):
    """Logs device and host bytes, loads, stalls, and samples and tokens per second.

    It logs as often as the trainer does (``log_every_n_steps``) and never waits for the device. Between two times it
    only counts the shapes of batches, so rates and traffic are means of the steps since the last time; validation and
    the loading of data are part of the time. Without streaming it logs the rates alone.

    Args:
        num_tokens: tokens of a batch; None takes :func:`num_tokens_by_shape`.
        num_samples: samples of a batch; None takes :func:`num_samples_by_shape`.
        prefix: of all names, such as ``"superpipe/peak_device_bytes"``.
    """

    def __init__(
        self,
        num_tokens: Callable[[Any], int] | None = None,
        num_samples: Callable[[Any], int] | None = None,
        prefix: str = "superpipe/",
    ) -> None:
        self._num_tokens = num_tokens or num_tokens_by_shape
        self._num_samples = num_samples or num_samples_by_shape
        self._prefix = prefix
        self._start_over()

    def _start_over(self) -> None:
        self._since = time.perf_counter()
        self._tokens = self._samples = 0
        self._logged_step = self._logged_training_steps = 0
        self._logged_total = StepCounters()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here."""
        self._start_over()
        self._logged_step = trainer.global_step
        if isinstance(trainer.strategy, SuperpipeMixin):  # the sanity check has loaded units already
            self._logged_total = trainer.strategy.report().total

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch; log when the trainer does."""
        self._tokens += self._num_tokens(batch)
        self._samples += self._num_samples(batch)
        step = trainer.global_step
        if step == self._logged_step or step % max(trainer.log_every_n_steps, 1) or not trainer.loggers:
            return  # an accumulating batch, or not a step to log
        metrics = self._rates(step)
        if isinstance(trainer.strategy, SuperpipeMixin):
            metrics |= self._traffic(trainer.strategy.report())
        for logger in trainer.loggers:
            logger.log_metrics({self._prefix + name: value for name, value in metrics.items()}, step=step - 1)

    def _rates(self, step: int) -> dict[str, float]:
        """Return how much was done a second since the last time."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "samples_per_second": self._samples / seconds,
            "steps_per_second": (step - self._logged_step) / seconds,
        }
        if self._tokens:
            rates["tokens_per_second"] = self._tokens / seconds
        self._since, self._tokens, self._samples, self._logged_step = now, 0, 0, step
        return rates

    def _traffic(self, report: Report) -> dict[str, float]:
        """Return bytes as they are, and what a training step moved and waited for since the last time."""
        moved = report.total - self._logged_total
        num_steps = max(report.num_steps - self._logged_training_steps, 1)
        self._logged_total, self._logged_training_steps = report.total, report.num_steps
        return {
            "peak_device_bytes": float(report.peak.total),
            **{f"peak_{kind}_bytes": float(size) for kind, size in report.peak._asdict().items()},
            "host_bytes": float(report.host_bytes),
            "loads_per_step": moved.num_loads / num_steps,
            "plan_misses_per_step": moved.num_plan_misses / num_steps,
            "h2d_bytes_per_step": moved.h2d_bytes / num_steps,
            "d2h_bytes_per_step": moved.d2h_bytes / num_steps,
            "stall_ms_per_step": 1e3 * moved.stall_seconds / num_steps,
        }


def num_samples_by_shape(batch: Any) -> int:
    """Return the length of the first dimension of a batch's first tensor, 0 if there is none.

    >>> num_samples_by_shape([torch.zeros(8, 3), torch.zeros(8)])
    8
    """
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 0)


def num_tokens_by_shape(batch: Any) -> int:
    """Return the elements of a batch's first tensor of integers with two dimensions (samples, tokens), 0 without one.

    Padding counts: hand over a function of your own where much of a batch is padding.

    >>> num_tokens_by_shape({"input_ids": torch.ones(4, 16, dtype=torch.long), "labels": torch.ones(4)})
    64
    """
    whole = (tensor for tensor in _tensors(batch) if not tensor.is_floating_point() and not tensor.is_complex())
    return next((tensor.numel() for tensor in whole if tensor.dim() == _NUM_TOKEN_DIMENSIONS), 0)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    tree = dict(batch) if isinstance(batch, Mapping) else batch  # the batches of tokenizers are no plain dicts
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
