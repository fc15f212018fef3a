"""Who looks at gradients between backward and the optimizer's step: then no unit may be updated in backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_superpipe.errors import UnsupportedError

__all__ = ["gradient_readers", "refuse_in_backward"]

_MODULE_HOOKS = (
    *("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"),
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_BASES = ("LightningModule", "ModelHooks", "Callback")  # their hooks do nothing, or what the trainer would do
_STAGE = "lightning_superpipe.optimizer.stage"
_ADVICE = "Use update='after_backward', which is exact as well and hides the update under the next forward."


def gradient_readers(trainer: Any) -> Iterator[str]:
    """Yield who may look at gradients before the step, or at weights of a step that was interrupted.

    Args:
        trainer: with a module and optimizers.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        yield "manual optimization"
    if trainer.gradient_clip_val:
        yield f"gradient_clip_val={trainer.gradient_clip_val}"
    if getattr(trainer.strategy.precision_plugin, "scaler", None) is not None:
        yield f"the gradient scaler of precision={trainer.precision!r}"
    if len(trainer.optimizers) > 1:
        yield f"{len(trainer.optimizers)} optimizers"
    yield from _overridden(module, _MODULE_HOOKS)
    for callback in trainer.callbacks:
        yield from _overridden(callback, _CALLBACK_HOOKS)
        if type(callback).__name__ == "OnExceptionCheckpoint" or getattr(callback, "save_on_exception", False):
            yield f"{type(callback).__name__}, which saves when a step is interrupted"
    for optimizer in trainer.optimizers:
        if any(getattr(hook, "__module__", "") != _STAGE for hook in optimizer._optimizer_step_pre_hooks.values()):
            yield f"a step hook of {type(optimizer).__name__}"


def refuse_in_backward(setting: str, reasons: list[str]) -> None:
    """Raise if updates in backward were asked for, but somebody looks at gradients.

    Raises:
        UnsupportedError: with all reasons, and what to use instead.
    """
    if setting == "in_backward" and reasons:
        raise UnsupportedError(
            f"update='in_backward' cannot be used with {', '.join(reasons)}: units would be updated before their "
            f"gradients were looked at. {_ADVICE}"
        )


def _overridden(thing: Any, hooks: tuple[str, ...]) -> Iterator[str]:
    """Yield the hooks that a thing or its classes define, the empty ones of the framework's base classes left out."""
    classes = [base for base in type(thing).__mro__ if base.__name__ not in _BASES]
    for hook in hooks:
        if hook in vars(thing) or any(hook in vars(base) for base in classes):
            yield f"{type(thing).__name__}.{hook}"
