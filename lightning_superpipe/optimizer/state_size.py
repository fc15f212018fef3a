"""How large the states of an optimizer will be, before its first step makes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from lightning_superpipe.optimizer.masters import wants_master

__all__ = ["missing_state_bytes"]

# State tensors as large as the parameter, always and by option.
_LIKE_PARAMETER: dict[type[Optimizer], tuple[int, tuple[str, ...]]] = {
    Adam: (2, ("amsgrad",)),
    AdamW: (2, ("amsgrad",)),
    NAdam: (2, ()),
    RAdam: (2, ()),
    Adamax: (2, ()),
    Adadelta: (2, ()),
    Rprop: (2, ()),
    RMSprop: (1, ("momentum", "centered")),
    Adagrad: (1, ()),
    ASGD: (1, ()),
    Muon: (1, ()),
    SGD: (0, ("momentum",)),
}


def missing_state_bytes(optimizer: Optimizer, *, with_masters: bool) -> int:
    """Bytes of the states that an optimizer will make for parameters that have none; 0 for classes not known here.

    Args:
        with_masters: states of parameters of 2 bytes are float32 (the masters themselves are not counted).

    >>> import torch
    >>> missing_state_bytes(AdamW([torch.nn.Parameter(torch.ones(10))]), with_masters=False)
    80
    """
    return sum(
        _num_elements(optimizer, group, parameter)
        * (4 if with_masters and wants_master(parameter) else parameter.itemsize)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not optimizer.state.get(parameter)
    )


def _num_elements(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    """Elements of the states of one parameter; numbers such as step counts are left out."""
    if type(optimizer) is Adafactor and parameter.dim() > 1:
        rows, columns = parameter.shape[-2:]
        return parameter.numel() // max(rows * columns, 1) * (rows + columns)
    always, by_option = _LIKE_PARAMETER.get(type(optimizer), (int(type(optimizer) is Adafactor), ()))
    return (always + sum(bool(group.get(name)) for name in by_option)) * parameter.numel()
