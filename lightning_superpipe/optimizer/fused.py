"""Choosing torch's fused CPU kernels for the user: they run at memory speed, the default loop is 6-20 times slower."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = ["choose_fused", "unfused_state"]

_HAVE_FUSED_CPU_KERNELS = (Adam, AdamW, SGD, Adagrad)


def choose_fused(optimizer: Optimizer) -> bool:
    """Turn the fused kernels on where torch has them and the user left the choice open; say whether any group changed.

    Not bit-equal to the loop over tensors, so it is for devices where the ordinary run would have used another kernel
    anyway. Subclasses keep what they have: their ``step`` may rely on it.
    """
    if type(optimizer) not in _HAVE_FUSED_CPU_KERNELS:
        return False
    changed = False
    for group in optimizer.param_groups:
        if group.get("fused", False) is None and not _excludes_fused(group):
            group["fused"] = changed = True
    if changed:
        optimizer._need_device_dtype_check_for_fused = True  # type: ignore[union-attr]  # as their constructors do
    return changed


def unfused_state(state: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with the user's own choice of kernels, for checkpoints that load elsewhere."""
    groups = [
        {**group, **({"fused": None} if group.get("fused") and original.get("fused") is None else {})}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _excludes_fused(group: dict[str, Any]) -> bool:
    """Whether options or parameters of a group rule the fused kernels out."""
    if group.get("foreach") or group.get("differentiable") or group.get("capturable"):
        return True
    return any(
        parameter.device.type != "cpu" or not torch.is_floating_point(parameter) for parameter in group["params"]
    )
