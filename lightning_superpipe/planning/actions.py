"""A plan is data: a tuple of small actions with a text form that prints, compares, saves and reads back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple, TypeAlias

from lightning_superpipe.errors import PlanError

__all__ = ["Action", "Op", "Order", "Plan", "Use", "format_actions", "parse_actions"]


class Op(str, Enum):
    """What an action does to its unit; the value is the letter of the text form."""

    PREFETCH = "P"
    """Start copying the unit into a slot: it is on the device, or on its way, from here on."""
    FORWARD = "F"
    """Compute the unit's forward; it must be on the device."""
    BACKWARD = "B"
    """Compute the unit's backward; it must be on the device."""
    EVICT = "E"
    """Give the unit's slot back; copies nothing, since weights do not change on the device."""
    GRADIENT = "G"
    """Copy the unit's finished gradients home."""
    UPDATE = "U"
    """Run the optimizer step of the unit in the store."""


class Action(NamedTuple):
    """One step of a plan: an operation on one unit.

    >>> str(Action(Op.PREFETCH, 3)), Action(Op.FORWARD, 3).is_use, Action(Op.EVICT, 3).is_use
    ('P3', True, False)
    """

    op: Op
    unit: int

    @property
    def is_use(self) -> bool:
        """Whether the action computes with the unit's weights (forward or backward)."""
        return self.op in _USES

    def __str__(self) -> str:
        """Return the text form: the letter of the operation, then the unit."""
        return f"{self.op.value}{self.unit}"


_USES = frozenset({Op.FORWARD, Op.BACKWARD})

Use: TypeAlias = Action
"""An action whose operation is ``Op.FORWARD`` or ``Op.BACKWARD``."""

Order: TypeAlias = tuple[Use, ...]
"""The uses of one pass or step, in the order in which they compute."""

_WORD = re.compile(r"([PFBEGU])(0|[1-9][0-9]{0,8})")


def parse_actions(text: str) -> tuple[Action, ...]:
    """Read actions from their text form: words like ``P0``, separated by white space.

    Raises:
        PlanError: a word is no action; the message names it and its position.

    >>> parse_actions("P0 F0")
    (Action(op=<Op.PREFETCH: 'P'>, unit=0), Action(op=<Op.FORWARD: 'F'>, unit=0))
    >>> parse_actions("P0 X1")
    Traceback (most recent call last):
    ...
    lightning_superpipe.errors.PlanError: word 2, 'X1', is not an action: write one of the letters PFBEGU \
and then the unit, like 'P0'.
    """
    actions = []
    for position, word in enumerate(text.split(), start=1):
        match = _WORD.fullmatch(word)
        if match is None:
            raise PlanError(
                f"word {position}, {word!r}, is not an action: write one of the letters {''.join(Op)} "
                "and then the unit, like 'P0'."
            )
        letter, unit = match.groups()
        actions.append(Action(Op(letter), int(unit)))
    return tuple(actions)


def format_actions(actions: Iterable[Action]) -> str:
    """Return the text form of actions; ``parse_actions`` reads it back.

    >>> format_actions([Action(Op.PREFETCH, 0), Action(Op.BACKWARD, 12)])
    'P0 B12'
    """
    return " ".join(map(str, actions))


@dataclass(frozen=True)
class Plan:
    """What the engine does in one pass or step, in program order.

    Attributes:
        actions: every action, uses and transfers.
        k: most units on the device at once, those in flight included.
        k_prime: units moved per transfer, ``1 <= k_prime <= k``.
        num_units: units are numbered ``0 .. num_units - 1``.
        resident: units on the device, with current weights, when the plan starts.
        keep: units that never leave once they are on the device.

    >>> plan = Plan(parse_actions("P1 F0 E0 F1"), k=2, k_prime=1, num_units=2, resident=frozenset({0}))
    >>> print(plan)
    P1 F0 E0 F1
    >>> plan.num_loads, sorted(plan.final_resident), format_actions(plan.uses)
    (1, [1], 'F0 F1')
    """

    actions: tuple[Action, ...]
    k: int
    k_prime: int
    num_units: int
    resident: frozenset[int] = frozenset()
    keep: frozenset[int] = frozenset()

    @cached_property
    def uses(self) -> Order:
        """The order that the plan computes."""
        return tuple(action for action in self.actions if action.is_use)

    @cached_property
    def num_loads(self) -> int:
        """Number of units copied to the device."""
        return sum(action.op is Op.PREFETCH for action in self.actions)

    @cached_property
    def final_resident(self) -> frozenset[int]:
        """Units on the device when the plan has run."""
        resident = set(self.resident)
        for op, unit in self.actions:
            if op is Op.PREFETCH:
                resident.add(unit)
            elif op is Op.EVICT:
                resident.discard(unit)
        return frozenset(resident)

    def __str__(self) -> str:
        """Return the text form of the actions."""
        return format_actions(self.actions)
