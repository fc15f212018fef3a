"""Whole models from the host to the device and back, with all that belongs to them; every object stays itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import ASGD, Optimizer
from torch.utils._pytree import tree_map_only

__all__ = ["bring_home", "move_to_device"]

_HOST = torch.device("cpu")


def bring_home(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Bring parameters, buffers, gradients and optimizer states to the host."""
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        model.to(_HOST)
    for optimizer in optimizers:
        _map_states(optimizer, lambda value, with_numbers: value.to(_HOST))


def move_to_device(model: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """Move parameters, buffers, gradients and optimizer states where the ordinary run has them.

    Single numbers, as the count of steps, stay on the host where torch's optimizers expect them there.

    Raises:
        torch.OutOfMemoryError: the device has no room; some may have been moved by then.
    """
    model.to(device)
    for optimizer in optimizers:
        _map_states(optimizer, lambda value, with_numbers: value.to(device) if value.dim() or with_numbers else value)


class _Moved(Protocol):
    """Returns a tensor where it belongs; ``with_numbers``: kernels take single numbers from there as well."""

    def __call__(self, value: Tensor, with_numbers: bool) -> Tensor: ...


def _map_states(optimizer: Optimizer, moved: _Moved) -> None:
    """Replace each tensor of an optimizer's states."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        group: dict[str, Any] = groups.get(id(parameter), {})
        with_numbers = bool(group.get("fused") or group.get("capturable")) or type(optimizer) is ASGD
        optimizer.state[parameter] = tree_map_only(Tensor, partial(moved, with_numbers=with_numbers), state)
