"""The rules of a plan, checked by walking through it; the message shows the plan and marks the guilty action."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning.actions import Action, Op, Order, Plan, format_actions

__all__ = ["check_plan", "residency"]

_NUM_SHOWN = 20  # actions shown before and after the guilty one


def check_plan(plan: Plan, order: Order | None = None) -> None:
    """Check that a plan can run, and that it computes ``order`` if one is given.

    Raises:
        PlanError: an action breaks a rule. A unit is prefetched only while it is not on the device, and used or evicted
            only while it is; never more than ``k`` are there, in flight or not; kept units are not evicted; units are
            numbered below ``num_units``; the uses are those of ``order``. Also if the start itself is impossible.
    Cost: O(actions), nothing is simulated but the set of units on the device.

    >>> from lightning_superpipe.planning.actions import parse_actions
    >>> check_plan(Plan(parse_actions("P0 F0 P1 F1"), k=1, k_prime=1, num_units=2))
    Traceback (most recent call last):
    ...
    lightning_superpipe.errors.PlanError: action 3 of 4, P1: more than k=1 units on the device (there already: 0)
      P0 F0 >>P1<< F1
    """
    _check_start(plan)
    resident = set(plan.resident)
    for position, action in enumerate(plan.actions):
        broken = _broken_rule(action, resident, plan)
        if broken is not None:
            there = ", ".join(map(str, sorted(resident))) or "none"
            raise _error(plan, position, f"{broken} (there already: {there})")
        _apply(action, resident)
    if order is not None:
        _check_uses(plan, order)


def residency(plan: Plan) -> tuple[int, ...]:
    """Return the number of units on the device, in flight included, after each action.

    >>> from lightning_superpipe.planning.actions import parse_actions
    >>> residency(Plan(parse_actions("P0 P1 F0 E0 F1"), k=2, k_prime=1, num_units=2))
    (1, 2, 2, 1, 1)
    """
    resident = set(plan.resident)
    counts = []
    for action in plan.actions:
        _apply(action, resident)
        counts.append(len(resident))
    return tuple(counts)


def _apply(action: Action, resident: set[int]) -> None:
    """Change the set of units on the device as an action does."""
    if action.op is Op.PREFETCH:
        resident.add(action.unit)
    elif action.op is Op.EVICT:
        resident.discard(action.unit)


def _broken_rule(action: Action, resident: AbstractSet[int], plan: Plan) -> str | None:
    """Return the rule that an action breaks, or None."""
    op, unit = action
    if not 0 <= unit < plan.num_units:
        return f"unit index out of range: the plan has {plan.num_units} units, numbered from 0"
    if op is Op.PREFETCH:
        if unit in resident:
            return "prefetch of a unit that is on the device"
        if len(resident) >= plan.k:
            return f"more than k={plan.k} units on the device"
    elif op is Op.EVICT:
        if unit not in resident:
            return "evict of a unit that is not on the device"
        if unit in plan.keep:
            return "evict of a unit that is kept for good"
    elif action.is_use and unit not in resident:
        return "use of a unit that is not on the device"
    return None


def _check_start(plan: Plan) -> None:
    """Raise PlanError if the plan cannot even start."""
    if not 1 <= plan.k_prime <= plan.k:
        raise PlanError(f"k={plan.k} and k_prime={plan.k_prime}: allowed is 1 <= k_prime <= k.\n  {plan}")
    strangers = sorted(unit for unit in plan.resident if not 0 <= unit < plan.num_units)
    if strangers:
        raise PlanError(
            f"unit {strangers[0]} is on the device at the start, but its index is out of range: "
            f"the plan has {plan.num_units} units, numbered from 0.\n  {plan}"
        )
    if len(plan.resident) > plan.k:
        there = ", ".join(map(str, sorted(plan.resident)))
        raise PlanError(f"more than k={plan.k} units are on the device at the start: {there}.\n  {plan}")


def _check_uses(plan: Plan, order: Order) -> None:
    """Raise PlanError at the first use that differs from the order."""
    positions = [position for position, action in enumerate(plan.actions) if action.is_use]
    for number, position in enumerate(positions):
        if number >= len(order):
            raise _error(plan, position, f"the order has only {len(order)} uses and ends before this one")
        if plan.actions[position] != order[number]:
            raise _error(plan, position, f"use {number + 1} of the order is {order[number]}")
    if len(positions) < len(order):
        missing = order[len(positions)]
        raise _error(plan, len(plan.actions), f"use {len(positions) + 1} of the order, {missing}, is missing")


def _error(plan: Plan, position: int, broken: str) -> PlanError:
    """Return the error for the action at a position; one past the last stands for the end of the plan."""
    actions = plan.actions
    guilty = str(actions[position]) if position < len(actions) else "end"
    before, after = max(0, position - _NUM_SHOWN), position + 1 + _NUM_SHOWN
    words = [
        "..." if before else "",
        format_actions(actions[before:position]),
        f">>{guilty}<<",
        format_actions(actions[position + 1 : after]),
        "..." if after < len(actions) else "",
    ]
    shown = " ".join(word for word in words if word)
    where = f"action {position + 1} of {len(actions)}, {guilty}" if position < len(actions) else "end of the plan"
    return PlanError(f"{where}: {broken}\n  {shown}")
