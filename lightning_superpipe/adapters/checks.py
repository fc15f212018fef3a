"""What a Lightning trainer may and may not be combined with, and what its user should know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from humanize import naturalsize
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_superpipe.errors import SuperpipeWarning, UnsupportedError
from lightning_superpipe.session import Session

__all__ = ["holds_copies", "refuse_foreign", "remarks", "runs_undisturbed", "turns_undisturbed"]

_NAMESPACES = ("lightning", "pytorch_lightning")
_OURS = __name__.partition(".")[0]
_COPIERS = frozenset(("WeightAveraging", "StochasticWeightAveraging"))
_WRITERS = frozenset((*_COPIERS, "ModelPruning", "LambdaCallback"))
_REFUSED_PRECISIONS = {
    "TransformerEnginePrecision": "transformer-engine replaces layers by stateful fp8 ones",
    "BitsandbytesPrecision": "bitsandbytes replaces layers by quantised ones",
    "DeepSpeedPrecision": "it hands the update to DeepSpeed's engine",
    "FSDPPrecision": "it drives FSDP's shards",
    "XLAPrecision": "it drives XLA's graphs",
}
_REGISTERED = frozenset(("_parameters", "_buffers", "_modules"))
_HOOK_PREFIX = "on_"
_HOOKS = frozenset(("backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"))
_HOOKS |= {"configure_gradient_clipping", "manual_backward"}
_TURN_HOOKS = frozenset(("on_before_backward", "on_before_zero_grad", "optimizer_zero_grad", "backward"))


def refuse_foreign(trainer: Any) -> None:
    """Raise for plugins that cannot work with streaming; warn of callbacks that fetch the model onto the device.

    Raises:
        UnsupportedError: the precision plugin replaces layers by stateful ones, or belongs to another strategy.
    """
    for name in _names(trainer.strategy.precision_plugin):
        if name in _REFUSED_PRECISIONS:
            raise UnsupportedError(
                f"{name} cannot be used with superpipe: {_REFUSED_PRECISIONS[name]}. "
                "Use precision='32-true', 'bf16-mixed', 'bf16-true', '16-mixed' or '64-true'."
            )
    device = trainer.strategy.compute_device
    for callback in trainer.callbacks:
        is_at_home = str(getattr(callback, "_device", None)).startswith("cpu")
        if device.type != "cpu" and not is_at_home and not _COPIERS.isdisjoint(_names(callback)):
            name = type(callback).__name__
            warnings.warn(
                f"{name} keeps a full copy of the model on {device}: pass device='cpu' to it to keep the copy on the "
                "host, or the device must hold the whole model.",
                SuperpipeWarning,
                stacklevel=2,
            )


def remarks(session: Session) -> Iterator[str]:
    """Yield what users could not see otherwise: that streaming is only emulated, or that it cannot pay."""
    units = session.units
    slots, total = session.k * units.largest.num_bytes, units.streamed_bytes + units.anchor_bytes
    if session.is_emulated and session.config.is_on_disk("weights") and session.config.link is None:
        yield (
            f"there is no accelerator: {session.k} units at a time are in memory ({_size(slots)}, beside buffers on "
            f"the way from and to files), {_size(units.streamed_bytes)} of weights in files"
        )
    elif session.is_emulated:
        yield (
            f"there is no accelerator, so streaming is emulated: {session.k} units at a time are copied to slots in "
            f"host memory ({_size(slots)}), beside the model itself ({_size(total)})"
        )
    if slots + units.anchor_bytes >= total:
        anchors = f" and {_size(units.anchor_bytes)} of anchors" if units.anchor_bytes else ""
        yield (
            f"streaming cannot pay: {session.k} slots as large as the largest unit ({units.largest.name!r}) take "
            f"{_size(slots)}{anchors}, all parameters together {_size(total)}; use a smaller k, or name smaller units "
            "(units=...)"
        )


def runs_undisturbed(module: Any) -> bool:
    """Whether no user code that could write weights runs between two steps: no own hooks, callbacks or optimizers.

    Writes through ``parameter.data`` leave no trace, so only then may weights stay on the device from step to step.
    """
    if module is None or getattr(module, "_trainer", None) is None:
        return False
    if _overrides_hooks(module) or not all(map(_is_harmless, module.trainer.callbacks)):
        return False
    # An optimizer may run the closure again at a point of its own (SAM).
    return all(_is_framework(type(optimizer)) for optimizer in module.trainer.optimizers)


def holds_copies(module: nn.Module) -> bool:
    """Whether a module or a part of it holds, beside what it registers, host tensors of the shape of a parameter.

    They may be copies of parameters, to compute with these.
    """
    shapes = {parameter.shape for parameter in module.parameters()}
    own = [value for part in module.modules() for name, value in vars(part).items() if name not in _REGISTERED]
    leaves = (leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor) and leaf.dim())
    return any(leaf.device.type == "cpu" and leaf.shape in shapes for leaf in leaves)


def turns_undisturbed(module: Any) -> bool:
    """Whether no user code runs between a training step's forward and its backward: the last units may stay."""
    if module is None or getattr(module, "_trainer", None) is None:
        return False
    # The framework's callbacks too: a LambdaCallback carries its user's hooks on itself.
    return all(_TURN_HOOKS.isdisjoint(_own_names(thing)) for thing in (module, *module.trainer.callbacks))


def _overrides_hooks(module: Any) -> bool:
    """Whether a module defines hooks outside the framework, in its classes or on itself."""
    return any(name.startswith(_HOOK_PREFIX) or name in _HOOKS for name in _own_names(module))


def _own_names(thing: Any) -> set[str]:
    """What a user has defined on a thing or in its classes."""
    own = [vars(base) for base in type(thing).__mro__ if not _is_framework(base)]
    return {name for names in (vars(thing), *own) for name in names}


def _is_harmless(callback: Any) -> bool:
    """Whether a callback writes no weights during training: the framework's, but for some, and our own."""
    is_known = _is_framework(type(callback)) or _package(type(callback)) == _OURS
    return is_known and _WRITERS.isdisjoint(_names(callback))


def _names(thing: Any) -> set[str]:
    """The names of a thing's classes: both namespaces have classes of their own."""
    return {base.__name__ for base in type(thing).__mro__}


def _is_framework(cls: type) -> bool:
    return _package(cls) in (*_NAMESPACES, "torch", "builtins", "abc", "typing")


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
