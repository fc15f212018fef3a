"""The promise that nobody touches gradients and options between backward and step; updates in backward rest on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from torch.optim import Optimizer

from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.optimizer.parts import Announced
from lightning_superpipe.optimizer.separable import has_options

__all__ = ["require_promise"]


def require_promise(
    announced: Announced | None, optimizer: Optimizer, units: Sequence[Unit], withdraw: Callable[[], list[str]]
) -> None:
    """Refuse a step that was announced, but does not find what units have been updated with.

    Args:
        announced: the step under way; None where none was.
        optimizer: whose step is asked for.
        withdraw: ends the step, undoes what can be undone, and returns the names of units that stay updated.

    Raises:
        SuperpipeError: names the unit, and says what has become of the step.
    """
    if announced is None or announced.optimizer is not optimizer or not (changed := _changed(announced, units)):
        return
    left = withdraw()
    state = (
        f"{len(left)} of {len(units)} units have been updated and the others not: go on from the last checkpoint."
        if left
        else "The step has not happened: weights and states are those of the last finished one."
    )
    raise SuperpipeError(
        f"{changed} were changed between backward and step, after units had been updated with what they were before: "
        f"this step was announced as one that uses them as they are. {state} Leave clipping, scaling and accumulating "
        "out of `updating(...)`, or use update='after_backward'."
    )


def _changed(announced: Announced, units: Sequence[Unit]) -> str:
    """Say what is not as it was; nothing if the promise was kept."""
    if announced.updated and not has_options(announced.optimizer, announced.groups):
        return f"options of {type(announced.optimizer).__name__}"
    overtaken = (i for i, part in announced.updated.items() if part.was_overtaken(may_be_gone=announced.lends))
    return "".join(f"gradients of unit {units[index].name!r}" for index in islice(overtaken, 1))
