"""Separable optimizers: those whose step for some parameters does not depend on the others, so that it can be split.

The user's optimizer stays the one that holds groups, hyperparameters and states. A part of its step is the step of its
own class on a *narrowed* twin of it: the same group options, fewer parameters, the same state entries.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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

__all__ = [
    "Member",
    "has_options",
    "is_scaled",
    "is_separable",
    "keeps_state",
    "members",
    "narrowed",
    "options",
    "parameters_of",
    "put_in_order",
    "run_for",
    "step_of",
    "trained",
]

# Exact classes: a subclass may look at all parameters in a `step` of its own.
_SEPARABLE = (ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop)


class Member(NamedTuple):
    """A parameter with a gradient, and the number of its group."""

    group: int
    parameter: nn.Parameter


def is_separable(optimizer: Optimizer) -> bool:
    """Whether a step may be split by parameters and run in parts, one of them in another thread.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> is_separable(AdamW([weight])), is_separable(torch.optim.LBFGS([weight]))
    (True, False)
    """
    return type(optimizer) in _SEPARABLE and not any(
        group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups
    )


def is_scaled(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has handed its factors over to the step: they change as soon as the step returns."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """Return the parameters of all groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def members(optimizer: Optimizer) -> list[Member]:
    """Return the parameters that a step would change now."""
    return [member for member in _everything(optimizer) if member.parameter.grad is not None]


def keeps_state(optimizer: Optimizer, member: Member) -> bool:
    """Whether the state of a parameter is there, or none is needed: a part that runs in a thread must create none."""
    if optimizer.state.get(member.parameter):
        return True
    return type(optimizer) is SGD and not optimizer.param_groups[member.group]["momentum"]


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of all groups as they are now: schedulers change them as soon as the step returns."""
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def has_options(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether all groups have just these options still.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    >>> taken = options(optimizer)
    >>> optimizer.param_groups[0]["lr"] = 0.2
    >>> has_options(optimizer, taken), has_options(optimizer, options(optimizer))
    (False, True)
    """
    now = options(optimizer)
    return len(now) == len(groups) and all(
        mine.keys() == others.keys() and all(_is_same(mine[key], others[key]) for key in mine)
        for mine, others in zip(now, groups, strict=True)
    )


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    return bool(value == other)


def trained(optimizer: Optimizer) -> list[Member]:
    """Return the parameters that a step behind the next backward pass is expected to change."""
    everything = _everything(optimizer)
    return [each for each in everything if each.parameter.requires_grad or each.parameter.grad is not None]


def _everything(optimizer: Optimizer) -> list[Member]:
    groups = enumerate(optimizer.param_groups)
    return [Member(index, parameter) for index, group in groups for parameter in group["params"]]


def run_for(optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]) -> None:
    """Run a step for some parameters, at once; ``groups`` as for :func:`narrowed`."""
    step_of(optimizer, groups, some, optimizer.state)


def narrowed(optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]) -> Callable[[], None]:
    """Return the step for some parameters and their gradients of now; to be called once, from any thread.

    Stand-ins carry the gradients, so that the user may drop ``p.grad`` meanwhile.

    Args:
        groups: what :func:`options` has returned.
    """
    stand_ins, state = [], defaultdict[Any, Any](dict)
    for group, parameter in some:
        stand_in: Any = parameter.detach()  # the same memory and version counter
        stand_in.grad = parameter.grad
        stand_ins.append(Member(group, stand_in))
        if parameter in optimizer.state:
            state[stand_in] = optimizer.state[parameter]
    return lambda: step_of(optimizer, groups, stand_ins, state)


def step_of(optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member], state: Any) -> None:
    """Run the step of an optimizer's class on its twin, without hooks: those belong to the step as a whole."""
    parts = [
        {**options, "params": [member.parameter for member in some if member.group == index]}
        for index, options in enumerate(groups)
    ]
    twin: Any = object.__new__(type(optimizer))
    twin.__dict__ = {**optimizer.__dict__, "param_groups": [part for part in parts if part["params"]], "state": state}
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(twin)


def put_in_order(optimizer: Optimizer, first: Iterable[Any]) -> None:
    """Give states the order in which the optimizer itself would have made them: it is that of checkpoints.

    Args:
        first: whose states there were before the step, in order.
    """
    order = dict.fromkeys([*first, *parameters_of(optimizer), *optimizer.state])
    states = {key: optimizer.state[key] for key in order if key in optimizer.state}
    optimizer.state.clear()
    optimizer.state.update(states)
