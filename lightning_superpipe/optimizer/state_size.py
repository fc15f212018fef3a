"""How large the states of an optimizer will be, before its first step makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, optim

from lightning_superpipe.optimizer.masters import wants_master

__all__ = ["missing_state_bytes", "missing_state_sizes", "state_tensor_sizes"]

# State tensors as large as the parameter, always and by option.
_LIKE_PARAMETER: dict[type[optim.Optimizer], tuple[int, tuple[str, ...]]] = {
    optim.Adam: (2, ("amsgrad",)),
    optim.AdamW: (2, ("amsgrad",)),
    optim.NAdam: (2, ()),
    optim.RAdam: (2, ()),
    optim.Adamax: (2, ()),
    optim.Adadelta: (2, ()),
    optim.Rprop: (2, ()),
    optim.RMSprop: (1, ("momentum", "centered")),
    optim.Adafactor: (1, ()),  # of vectors; matrices keep a row and a column
    optim.Adagrad: (1, ()),
    optim.ASGD: (1, ()),
    optim.Muon: (1, ()),
    optim.SGD: (0, ("momentum",)),
}

_NUMBERS = [1, 1, 1]
"""Step counts and the like; ASGD keeps three."""


def missing_state_bytes(optimizer: optim.Optimizer, *, with_masters: bool) -> int:
    """Bytes of the states that an optimizer will make for parameters that have none; 0 for classes not known here.

    Args:
        with_masters: states of parameters of 2 bytes are float32 (the masters themselves are not counted).

    >>> import torch
    >>> missing_state_bytes(optim.AdamW([torch.nn.Parameter(torch.ones(10))]), with_masters=False)
    80
    """
    return sum(
        _num_elements(optimizer, group, parameter)
        * (4 if with_masters and wants_master(parameter) else parameter.itemsize)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not optimizer.state.get(parameter)
    )


def missing_state_sizes(optimizer: optim.Optimizer, parameters: Sequence[Tensor], *, with_masters: bool) -> list[int]:
    """Bytes of each state tensor, masters among them, of parameters of which some have no states yet; else nothing.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    >>> optimizer = optim.AdamW([weight])
    >>> missing_state_sizes(optimizer, [weight], with_masters=True)
    [40, 40, 40]
    """
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = [each for each in parameters if each.requires_grad and id(each) in group_of]
    if all(optimizer.state.get(each) for each in trained):
        return []
    sizes = []
    for each in trained:
        has_master = with_masters and wants_master(each)
        counts = state_tensor_sizes(optimizer, group_of[id(each)], each)[: -len(_NUMBERS)]
        counts += [each.numel()] if has_master else []
        sizes += [count * (4 if has_master else each.itemsize) for count in counts if count > 1]
    return sizes


def state_tensor_sizes(optimizer: optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> list[int]:
    """Elements of each state tensor of one parameter, at most; classes that are not known here have none.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(10))
    >>> optimizer = optim.AdamW([weight])
    >>> state_tensor_sizes(optimizer, optimizer.param_groups[0], weight)
    [10, 10, 1, 1, 1]
    """
    if type(optimizer) is optim.Adafactor and parameter.dim() > 1:
        rows, columns = parameter.shape[-2:]
        num_matrices = parameter.numel() // max(rows * columns, 1)
        return [num_matrices * rows, num_matrices * columns, *_NUMBERS]
    always, by_option = _LIKE_PARAMETER.get(type(optimizer), (0, ()))
    return [parameter.numel()] * (always + sum(bool(group.get(name)) for name in by_option)) + _NUMBERS


def _num_elements(optimizer: optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    """Elements of the states of one parameter; numbers such as step counts are left out."""
    return sum(state_tensor_sizes(optimizer, group, parameter)[: -len(_NUMBERS)])
