"""Orders: which unit computes when, before anyone has decided what to move."""

from __future__ import annotations

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning.actions import Action, Op, Order

__all__ = ["distinct_units", "forward_order", "training_order"]


def forward_order(num_units: int) -> Order:
    """Return the order of one forward pass through a chain of units.

    Raises:
        PlanError: a negative number of units.

    >>> from lightning_superpipe.planning.actions import format_actions
    >>> format_actions(forward_order(3))
    'F0 F1 F2'
    """
    _check_num_units(num_units)
    return tuple(Action(Op.FORWARD, unit) for unit in range(num_units))


def training_order(num_units: int, lowest: int = 0) -> Order:
    """Return the order of one forward and backward through a chain of units.

    Args:
        lowest: the first unit with anything to train; backward ends there.

    Raises:
        PlanError: a negative number of units.

    >>> from lightning_superpipe.planning.actions import format_actions
    >>> format_actions(training_order(3)), format_actions(training_order(3, lowest=2))
    ('F0 F1 F2 B2 B1 B0', 'F0 F1 F2 B2')
    """
    forward = forward_order(num_units)
    return forward + tuple(Action(Op.BACKWARD, unit) for _, unit in reversed(forward[lowest:]))


def distinct_units(order: Order) -> tuple[int, ...]:
    """Return the units of an order, each once, by their first use.

    >>> from lightning_superpipe.planning.actions import parse_actions
    >>> distinct_units(parse_actions("F2 F0 F2 B2 B0"))
    (2, 0)
    """
    return tuple(dict.fromkeys(use.unit for use in order))


def _check_num_units(num_units: int) -> None:
    if num_units < 0:
        raise PlanError(f"num_units={num_units}: an order has 0 or more units.")
