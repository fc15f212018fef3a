"""A training step of Lightning's automatic optimization that ran out of device memory is repeated under a smaller plan.

The closure that Lightning gives to the optimizer is the whole step: forward, ``zero_grad``, backward. Beside what
:class:`~lightning_superpipe.rewind.Rewind` knows, it has changed metrics, which count batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superpipe.session import Session

__all__ = ["repeated_if_too_large"]


def repeated_if_too_large(session: Session, closure: Callable[[], Any], module: Any) -> Any:
    """Run a closure, again with less on the device where that had no room for it.

    Raises:
        OutOfDeviceMemory: no smaller plan is left, or the step cannot be repeated exactly.
    """
    while True:
        session.attempts.begin()
        before = _LoopState(module)
        reason = ""
        try:
            return closure()
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself holds the step's frames, and with them its activations
        finally:
            if not reason:
                session.attempts.end()
        before.restore()
        session.fall_back(reason)


class _LoopState:
    """What the trainer and the module's metrics know of a step."""

    def __init__(self, module: Any) -> None:
        self._module = module
        results = getattr(getattr(module, "_trainer", None), "_results", None)
        self._results: Any = {} if results is None else results
        self._names = set(self._results)
        logged = self._results.values()
        self._metrics = [(metric, _metric_state(metric)) for metric in (*logged, *_metrics_in(module))]
        self._function = module._current_fx_name

    def restore(self) -> None:
        """Forget the step."""
        for name in set(self._results) - self._names:
            del self._results[name]
        for metric, state in self._metrics:
            metric.__dict__.update(state)
        self._module._current_fx_name = self._function


def _metrics_in(module: nn.Module) -> Iterable[Any]:
    return (inner for inner in module.modules() if hasattr(inner, "_defaults") and hasattr(inner, "_update_count"))


def _metric_state(metric: Any) -> dict[str, Any]:
    """Copies of a metric's states, and its plain attributes, which updates replace."""
    return {name: _copied(value) for name, value in vars(metric).items() if not isinstance(value, nn.Module)}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value
