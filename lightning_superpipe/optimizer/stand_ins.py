"""Stand-ins: tensors in other memory that take the place of parameters, gradients and states for a part of a step.

Who brings them there and back is not decided here: masters are cast, files are read and written, a device copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_superpipe.optimizer.separable import Member, step_of

__all__ = ["StandIn", "held", "step_on"]


class StandIn(NamedTuple):
    """What stands in for one parameter; tensors of one device and of equal sizes.

    Attributes:
        group: number of the parameter's group.
        parameter: what the step changes, in place.
        gradient: what the step reads.
        state: the optimizer's own entries, as kernels shall see them; empty for a first step. It is not changed itself,
            but the tensors in it are.
    """

    group: int
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]


def held(optimizer: Optimizer, member: Member) -> StandIn:
    """What a member has itself, its gradient of now included; its state is the optimizer's own dict, if any."""
    parameter = member.parameter
    assert parameter.grad is not None, "members have gradients"
    return StandIn(member.group, parameter.detach(), parameter.grad, optimizer.state.get(parameter, {}))


def step_on(
    optimizer: Optimizer, groups: Sequence[dict[str, Any]], stand_ins: Sequence[StandIn]
) -> list[dict[str, Any]]:
    """Run the step of an optimizer's class on stand-ins, from any thread; the optimizer itself is not touched.

    Args:
        optimizer: a separable one.
        groups: what :func:`separable.options` has returned.

    Returns:
        Of each stand-in the state entries that the step has made, or replaced by other objects (a first step makes all,
        numbers are replaced). Whatever is not among them has been changed in place, or not at all.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    >>> elsewhere = StandIn(0, torch.ones(2), torch.ones(2), {})
    >>> step_on(optimizer, optimizer.param_groups, [elsewhere])
    [{'momentum_buffer': tensor([1., 1.])}]
    >>> elsewhere.parameter, weight.tolist()
    (tensor([0.5000, 0.5000]), [1.0, 1.0])
    """
    some: list[Member] = []
    states = defaultdict[Any, Any](dict)
    for each in stand_ins:
        parameter: Any = each.parameter.detach()
        parameter.grad = each.gradient
        some.append(Member(each.group, parameter))
        states[parameter] = dict(each.state)
    step_of(optimizer, groups, some, states)
    return [
        {name: value for name, value in states[parameter].items() if value is not each.state.get(name)}
        for each, (_, parameter) in zip(stand_ins, some, strict=True)
    ]
