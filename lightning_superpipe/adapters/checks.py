"""What a Lightning trainer may and may not be combined with."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_superpipe.errors import SuperpipeWarning, UnsupportedError

__all__ = ["refuse_foreign", "runs_undisturbed"]

_NAMESPACES = ("lightning", "pytorch_lightning")
_WRITERS = frozenset(("WeightAveraging", "StochasticWeightAveraging", "ModelPruning", "LambdaCallback"))
_REFUSED_PRECISIONS = {
    "TransformerEnginePrecision": "transformer-engine replaces layers by stateful fp8 ones",
    "BitsandbytesPrecision": "bitsandbytes replaces layers by quantised ones",
}
_HOOK_PREFIXES = ("on_",)
_HOOKS = ("backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping")


def refuse_foreign(trainer: Any) -> None:
    """Raise for plugins that cannot work with streaming; warn of those that fetch the model onto the device.

    Raises:
        UnsupportedError: the precision plugin replaces layers by stateful ones.
    """
    precision = type(trainer.strategy.precision_plugin).__name__
    if precision in _REFUSED_PRECISIONS:
        raise UnsupportedError(
            f"{precision}: {_REFUSED_PRECISIONS[precision]}, which cannot be streamed. "
            "Use precision='32-true', 'bf16-mixed', 'bf16-true' or '16-mixed'."
        )
    device = trainer.strategy.compute_device
    for callback in trainer.callbacks:
        keeps_copy = any(base.__name__ in ("WeightAveraging", "StochasticWeightAveraging") for base in type(callback).__mro__)
        where = str(getattr(callback, "_device", None))
        if keeps_copy and device.type != "cpu" and not where.startswith("cpu"):
            name = type(callback).__name__
            warnings.warn(
                f"{name} keeps a full copy of the model on {device}: pass device='cpu' to it to keep the copy on the "
                "host, or the device must hold the whole model.",
                SuperpipeWarning,
                stacklevel=2,
            )


def runs_undisturbed(module: Any) -> bool:
    """Whether no user code that could write weights runs between two steps: no own hooks, no own callbacks.

    Writes through ``parameter.data`` leave no trace, so only then may weights stay on the device from step to step.
    """
    if module is None or getattr(module, "_trainer", None) is None:
        return False
    return not _overrides_hooks(type(module)) and all(_is_harmless(callback) for callback in module.trainer.callbacks)


def _overrides_hooks(cls: type) -> bool:
    """Whether a module's class defines hooks outside the framework."""
    own = {name for base in cls.__mro__ if not _is_framework(base) for name in vars(base)}
    return any(name.startswith(_HOOK_PREFIXES) or name in _HOOKS for name in own)


def _is_harmless(callback: Any) -> bool:
    names = {base.__name__ for base in type(callback).__mro__}
    return _is_framework(type(callback)) and not names & _WRITERS


def _is_framework(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in (*_NAMESPACES, "torch", "builtins", "abc", "typing")
