"""Slow and obvious forms of what the planner does, written independently of it, and shapes to try them on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lightning_superpipe.planning import Action, Op, Order, Plan

NEVER = 10**9


def small_shapes(max_units: int) -> list[tuple[int, int, int]]:
    """Every (num_units, k, k_prime) up to a size, k > num_units included."""
    return [
        (num_units, k, k_prime)
        for num_units in range(1, max_units + 1)
        for k in range(1, num_units + 2)
        for k_prime in range(1, k + 1)
    ]


def next_use(order: Order, start: int, unit: int) -> int:
    """Position of the first use of a unit from ``start`` on."""
    return next((position for position in range(start, len(order)) if order[position].unit == unit), NEVER)


def belady_loads(order: Order, k: int, resident: Collection[int] = ()) -> int:
    """Fewest loads of any plan with k slots: load on demand, evict what is needed last (Belady 1966)."""
    there, loads = set(resident), 0
    for position, use in enumerate(order):
        if use.unit not in there:
            if len(there) == k:
                there.remove(max(there, key=lambda unit: next_use(order, position, unit)))
            there.add(use.unit)
            loads += 1
    return loads


def num_runs(order: Order) -> int:
    """Number of times that the computing unit changes: what a single slot would load."""
    return sum(index == 0 or order[index - 1].unit != use.unit for index, use in enumerate(order))


class _Slow:
    """The window, with everything searched for anew whenever it is needed."""

    def __init__(self, order: Order, k: int, resident: Collection[int], keep: Collection[int], cyclic: bool) -> None:
        self.future = order * 2 if cyclic else order
        self.k, self.keep = k, set(keep)
        self.there, self.last = set(resident), dict.fromkeys(resident, -1)
        self.actions: list[Action] = []

    def comers(self, now: int) -> list[tuple[int, int]]:
        away = {use.unit for use in self.future} - self.there
        return sorted((when, unit) for unit in away if (when := next_use(self.future, now, unit)) < NEVER)

    def goers(self, now: int) -> list[tuple[int, int, int]]:
        may_go = self.there - self.keep
        return sorted(((next_use(self.future, now, unit), -self.last[unit], unit) for unit in may_go), reverse=True)

    def fill(self, now: int) -> None:
        for _, unit in self.comers(now)[: self.k - len(self.there)]:
            self.prefetch(unit)

    def swap(self, now: int, k_prime: int) -> int:
        pairs = [
            (goer[2], comer[1])
            for goer, comer in zip(self.goers(now)[:k_prime], self.comers(now)[:k_prime], strict=False)
            if goer[0] > comer[0]
        ]
        for unit, _ in pairs:
            self.evict(unit)
        for _, unit in pairs:
            self.prefetch(unit)
        return len(pairs)

    def prefetch(self, unit: int) -> None:
        self.there.add(unit)
        self.last[unit] = -1
        self.actions.append(Action(Op.PREFETCH, unit))

    def evict(self, unit: int) -> None:
        self.there.remove(unit)
        self.actions.append(Action(Op.EVICT, unit))

    def use(self, position: int) -> None:
        self.actions.append(self.future[position])
        self.last[self.future[position].unit] = position


def slow_lowering(
    order: Order, k: int, k_prime: int, resident: Collection[int], keep: Collection[int], cyclic: bool
) -> tuple[Action, ...]:
    """The rule of ``lower_window``, word by word: as soon as k_prime units are idle, they go and the next come."""
    slow = _Slow(order, k, resident, keep, cyclic)
    for now in range(len(order) + 1):
        slow.fill(now)
        while comers := slow.comers(now):
            goers = slow.goers(now)
            num_idle = sum(when > comers[0][0] for when, _, _ in goers)
            if num_idle < min(k_prime, len(goers)):
                break
            slow.swap(now, k_prime)
        if now < len(order):
            slow.use(now)
    return tuple(slow.actions)


def counted_lowering(
    order: Order, k: int, k_prime: int, resident: Collection[int] = (), cyclic: bool = False
) -> tuple[Action, ...]:
    """The glossary with a counter: after k_prime uses they go and the next k_prime come; the turn counts anew."""
    slow = _Slow(order, k, resident, (), cyclic)
    slow.fill(0)
    counter = 0
    for position, use in enumerate(order):
        assert use.unit in slow.there, "this reading is for chains: it never loads on demand there"
        slow.use(position)
        turned = position > 0 and order[position - 1].op is not use.op
        counter = 1 if turned else counter + 1
        if counter >= k_prime and slow.swap(position + 1, k_prime):
            counter = 0
    return tuple(slow.actions)


def transfers(plan: Plan) -> Iterator[tuple[int, list[int]]]:
    """Each group of actions between two uses that moves something: (number of uses before it, units that come)."""
    num_uses, coming = 0, list[int]()
    for action in (*plan.actions, Action(Op.FORWARD, -1)):
        if action.is_use:
            if coming:
                yield num_uses, coming
            num_uses, coming = num_uses + 1, []
        elif action.op is Op.PREFETCH:
            coming.append(action.unit)


def num_computing_before(future: Order, start: int, unit: int) -> int:
    """Number of different units that compute from ``start`` until ``unit`` does."""
    return len({use.unit for use in future[start : next_use(future, start, unit)]})
