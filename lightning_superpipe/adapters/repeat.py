"""Training steps that ran out of device memory are repeated under a smaller plan, where a loop hands over whole steps.

Lightning's automatic optimization gives the optimizer a closure that is one: forward, ``zero_grad``, backward. The
Trainer of transformers has a method for forward and backward. Beside what
:class:`~lightning_superpipe.rewind.Rewind` knows, a step has changed what the loop notes for its logs.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_superpipe.session import Session

__all__ = ["LightningNotes", "Notes", "TrainerNotes", "repeated_if_too_large"]

_Result = TypeVar("_Result")
_PLAIN = (int, float, str, type(None))
_CONTAINERS = (list, dict, collections.defaultdict, collections.deque)
_LONGEST = 10_000


class Notes(Protocol):
    """What a loop knew of a step before it."""

    def restore(self) -> None:
        """Forget the step."""


def repeated_if_too_large(session: Session, step: Callable[[], _Result], notes: Callable[[], Notes]) -> _Result:
    """Run a step, again with less on the device where that had no room for it.

    Args:
        step: forward and backward; what it returns is given back.
        notes: notes what the loop knows now.

    Raises:
        OutOfDeviceMemory: no smaller plan is left, or the step cannot be repeated exactly.
    """
    guard = session.guard
    guard.is_repeated = True
    try:
        while True:
            guard.attempts.begin()
            before = notes()
            reason = ""
            try:
                return step()
            except torch.OutOfMemoryError as error:
                reason = str(error)  # the error itself holds the step's frames, and with them its activations
            before.restore()
            guard.fall_back(reason)
    finally:
        guard.is_repeated = False


class LightningNotes:
    """What Lightning's trainer and the module's metrics know of a step."""

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


class TrainerNotes:
    """What a Trainer of transformers notes for its logs: numbers, and containers of numbers, in its attributes."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        own = {name: value for name, value in vars(trainer).items() if not name.endswith("dataset")}
        self._attributes = {name: value for name, value in own.items() if isinstance(value, _PLAIN)}
        self._contents = [(value, _content(value)) for value in own.values() if _is_noted(value)]

    def restore(self) -> None:
        """Forget the step."""
        vars(self._trainer).update(self._attributes)
        for container, content in self._contents:
            _refill(container, content)


def _is_noted(value: Any) -> bool:
    """Whether a value is a container of plain numbers and such containers only, not longer than logs are."""
    if type(value) not in _CONTAINERS or len(value) > _LONGEST:
        return False
    return all(
        isinstance(each, _PLAIN) or _is_noted(each) for each in (value.values() if isinstance(value, dict) else value)
    )


def _content(value: Any) -> Any:
    """A copy of a container that :func:`_refill` puts back into it, and of those inside."""
    if isinstance(value, dict):
        return [(key, each, _content(each)) for key, each in value.items()]
    return [(None, each, _content(each)) for each in value] if type(value) in _CONTAINERS else None


def _refill(container: Any, content: Any) -> None:
    container.clear()
    for key, value, inner in content:
        if inner is not None:
            _refill(value, inner)
        if isinstance(container, dict):
            container[key] = value
        else:
            container.append(value)
