"""Lowering: from an order of uses to a plan that also says what moves, and when.

One rule decides everything. Between two uses, call a unit on the device *idle* if its next use lies behind the next use
of the *comer*, the unit that is not on the device and is needed first. As soon as ``k_prime`` units are idle, up to
``k_prime`` of them go, those needed last first, and the next units come. A unit never goes for one needed after it.

On a chain of units this is "after ``k_prime`` units have computed, they go and the next ``k_prime`` come": a unit that
has computed is idle, and the last ``k`` units of a forward are not, since the backward needs them first, so the turn
reloads nothing. Being a statement about units, not about steps of a counter, it means the same for a unit used several
times in a row, for a recomputed one (F then B of each), and for whatever happened to be on the device at the start.

It follows that ``k - k_prime`` units are still to compute while a transfer is under way: none for ``k_prime = k``.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning.actions import Action, Op, Order, Plan, Use
from lightning_superpipe.planning.order import distinct_units

__all__ = ["forward_keep", "lower_window", "spread"]


def lower_window(
    order: Iterable[Use],
    *,
    k: int,
    k_prime: int,
    resident: Iterable[int] = frozenset(),
    keep: Iterable[int] = frozenset(),
    cyclic: bool = False,
) -> Plan:
    """Return the plan that computes an order with at most ``k`` units on the device, moving ``k_prime`` at a time.

    Args:
        order: the uses, in order; they appear unchanged in the plan.
        k: most units on the device at once, those in flight included.
        k_prime: units per transfer, ``1 <= k_prime <= k``; only ``k_prime < k`` overlaps copies with compute.
        resident: units on the device, with current weights, at the start; at most ``k``.
        keep: units that never leave once they are on the device; fewer than ``k``, unless nothing else is used.
        cyclic: the same order comes again right after this one with unchanged weights, so prefetch for it too.
    Returns:
        The plan; equal arguments give the same object. Its ``num_units`` covers every unit named in the arguments.
    Raises:
        PlanError: ``k``, ``k_prime``, ``resident`` or ``keep`` are impossible, or the order holds more than uses.
    Cost: O((uses + loads) * log(units)) and a list insertion in C of at most ``k`` entries per use.

    >>> from lightning_superpipe.planning.order import forward_order, training_order
    >>> print(lower_window(training_order(4), k=2, k_prime=1))
    P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0
    >>> print(lower_window(training_order(4), k=2, k_prime=2))
    P0 P1 F0 F1 E0 E1 P2 P3 F2 F3 B3 B2 E3 E2 P1 P0 B1 B0
    >>> print(lower_window(forward_order(3), k=2, k_prime=1, resident={0, 1}, cyclic=True))
    F0 E0 P2 F1 E1 P0 F2 E2 P1
    """
    return _lower(_Request(tuple(order), k, k_prime, frozenset(resident), frozenset(keep), bool(cyclic)))


def forward_keep(order: Order, k: int, k_prime: int) -> frozenset[int]:
    """Return the units to keep on the device for good while one forward-only order is repeated.

    A cyclic scan through ``k`` slots reloads every unit every time. So ``k_prime + 1`` slots stream, the fewest that
    overlap, and the others keep units for good, spread evenly so that the copies are spread evenly as well. No unit is
    worth keeping if all fit anyway.

    >>> from lightning_superpipe.planning.order import forward_order
    >>> sorted(forward_keep(forward_order(9), k=5, k_prime=1))
    [0, 3, 6]
    >>> sorted(forward_keep(forward_order(9), k=9, k_prime=1))
    []
    """
    units = distinct_units(order)
    num_kept = max(0, k - min(k, k_prime + 1)) if k < len(units) else 0
    return spread(units, num_kept)


def spread(units: Sequence[int], count: int) -> frozenset[int]:
    """Return ``count`` of the units, evenly spread.

    >>> sorted(spread(range(9), 3))
    [0, 3, 6]
    """
    return frozenset(units[index * len(units) // count] for index in range(count))


class _Request(NamedTuple):
    """The arguments of ``lower_window`` in hashable form."""

    order: Order
    k: int
    k_prime: int
    resident: frozenset[int]
    keep: frozenset[int]
    cyclic: bool


@lru_cache(maxsize=256)
def _lower(request: _Request) -> Plan:
    """Check a request, walk its order once and put the transfers between the uses."""
    _check_request(request)
    next_uses = _find_next_uses(request.order, cyclic=request.cyclic)
    window = _Window(request, next_uses)
    actions = window.transfer()
    for position, use in enumerate(request.order):
        actions.append(use)
        window.compute(use.unit, position, next_uses.after[position])
        actions += window.transfer()
    named = {use.unit for use in request.order} | request.resident | request.keep
    return Plan(
        tuple(actions),
        k=request.k,
        k_prime=request.k_prime,
        num_units=max(named, default=-1) + 1,
        resident=request.resident,
        keep=request.keep,
    )


class _NextUses(NamedTuple):
    """Positions in the order; ``never`` is later than any of them."""

    first: dict[int, int]
    """Of each unit in the order, the position of its first use."""
    after: list[int]
    """For each position, where its unit is used next; in a cyclic order perhaps in the second copy."""
    never: int


def _find_next_uses(order: Order, *, cyclic: bool) -> _NextUses:
    """Find every next use in one walk from the end."""
    num_uses = len(order)
    never = 2 * num_uses
    upcoming: dict[int, int] = {}
    if cyclic:
        for position in reversed(range(num_uses)):
            upcoming[order[position].unit] = num_uses + position
    after = [never] * num_uses
    for position in reversed(range(num_uses)):
        unit = order[position].unit
        after[position] = upcoming.get(unit, never)
        upcoming[unit] = position
    return _NextUses(first=upcoming, after=after, never=never)


class _Goer(NamedTuple):
    """A unit on the device that may go; the greatest goes first."""

    next_use: int
    age: int  # minus the position of its last use, 1 if it was not used yet: of two needed never again, the older goes
    unit: int


class _Window:
    """The units on the device, and those still to come, sorted by when they are needed."""

    def __init__(self, request: _Request, next_uses: _NextUses) -> None:
        self._k_prime, self._keep = request.k_prime, request.keep
        self._never = next_uses.never
        self._num_free = request.k - len(request.resident)
        self._goers = sorted(
            _Goer(next_uses.first.get(unit, self._never), 1, unit) for unit in request.resident - request.keep
        )
        self._comers = [(first, unit) for unit, first in next_uses.first.items() if unit not in request.resident]
        heapify(self._comers)

    def compute(self, unit: int, position: int, next_use: int) -> None:
        """Note that a unit computes at ``position`` and when it is needed again."""
        if unit not in self._keep:
            # What computes now is needed before all others, so it is the smallest goer.
            computing = self._goers.pop(0)
            assert computing.unit == unit and computing.next_use == position
            insort(self._goers, _Goer(next_use, -position, unit))

    def transfer(self) -> list[Action]:
        """Return what moves now: free slots are filled, and ``k_prime`` idle units make room for the next ones."""
        actions: list[Action] = []
        while self._comers and self._num_free:
            self._num_free -= 1
            actions.append(self._prefetch())
        while self._comers and self._num_idle() >= min(self._k_prime, len(self._goers)):
            evicts: list[Action] = []
            prefetches: list[Action] = []
            while len(evicts) < self._k_prime and self._comers and self._num_idle():
                evicts.append(self._evict())
                prefetches.append(self._prefetch())
            actions += evicts + prefetches
        return actions

    def _num_idle(self) -> int:
        """Count the units that may go and are needed only after the first comer."""
        first_needed, unit = self._comers[0]
        return len(self._goers) - bisect(self._goers, _Goer(first_needed, 1, unit))

    def _prefetch(self) -> Action:
        next_use, unit = heappop(self._comers)
        if unit not in self._keep:
            insort(self._goers, _Goer(next_use, 1, unit))
        return Action(Op.PREFETCH, unit)

    def _evict(self) -> Action:
        next_use, _, unit = self._goers.pop()
        if next_use < self._never:
            heappush(self._comers, (next_use, unit))
        return Action(Op.EVICT, unit)


def _check_request(request: _Request) -> None:
    """Raise PlanError for arguments that no plan can satisfy."""
    order, k, k_prime, resident, keep, _ = request
    if k < 1:
        raise PlanError(f"k={k}: at least one unit must be on the device to compute. Use k>=1.")
    if not 1 <= k_prime <= k:
        raise PlanError(f"k_prime={k_prime} with k={k}: between 1 and k units move at a time. Use 1<=k_prime<={k}.")
    for position, action in enumerate(order, start=1):
        if not action.is_use or action.unit < 0:
            raise PlanError(f"action {position} of the order, {action}, is not a use: allowed are F and B of a unit.")
    if min(resident | keep, default=0) < 0:
        raise PlanError(f"unit {min(resident | keep)} in resident or keep: units are numbered from 0.")
    if len(resident) > k:
        raise PlanError(f"{len(resident)} units are on the device at the start ({_names(resident)}), but k={k}.")
    used = {use.unit for use in order}
    held = keep & (used | resident)
    if len(held) > k or (len(held) == k and not used <= held):
        raise PlanError(
            f"keep holds {len(held)} units ({_names(held)}) and k={k}: no slot is left to stream the others through. "
            f"Keep at most {k - 1}."
        )


def _names(units: Iterable[int]) -> str:
    """Return unit numbers as text, in order."""
    return ", ".join(map(str, sorted(units)))
