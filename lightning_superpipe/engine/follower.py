"""Follows the order of uses as it happens, against the order of the last step, and says what to move when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning_superpipe.planning import Action, Op, Plan, forward_keep, forward_order, lower_window, training_order

__all__ = ["TRAIN", "Follower"]

TRAIN = "train"
_USES = (Op.FORWARD, Op.BACKWARD)


class Follower:
    """The expected order per mode, the plan made of it, and how far the step has come.

    The order of a mode is that of its last step; the first step of a mode expects the order of registration. Where a
    step deviates, the plan is made anew from the point where the order goes on; what is unknown is left to loading on
    demand. All of it is a hint: nothing here can make a number wrong.

    Args:
        k: slots.
        keep: units that stay on the device once they are there, while training; evaluation chooses for itself.

    Attributes:
        lowest: the first unit with anything to train.
        plan: the one in force; None before the first step.
        num_deviations: uses that were not the expected next ones.
    """

    def __init__(self, num_units: int, k: int, k_prime: int, keep: frozenset[int] = frozenset()) -> None:
        self._num_units, self._k, self._k_prime, self._keep = num_units, k, k_prime, keep
        self.lowest = 0
        self._known: dict[str, tuple[Action, ...]] = {}
        self._mode: str | None = None
        self._trace: list[Action] = []
        self._num_forwards: Counter[int] = Counter()
        self._order: tuple[Action, ...] = ()
        self._position = 0
        self._cursor = 0
        self._may_look_ahead = False
        self.plan: Plan | None = None
        self.num_deviations = 0

    def knows(self, mode: str) -> bool:
        """Whether a step of this mode has been seen."""
        return mode in self._known

    def widen(self, k: int, k_prime: int, keep: frozenset[int]) -> None:
        """Use more or fewer slots, move units in other numbers and keep others, from the next plan on."""
        self._k, self._k_prime, self._keep = k, k_prime, keep

    def begin(self, mode: str, resident: Iterable[int], *, next_is_same: bool) -> list[Action]:
        """Start a step; return what to move before its first use.

        Args:
            resident: units on the device now, bytes up to date.
            next_is_same: the following step may use what this one leaves on the device.
        """
        self.end()
        self._mode = mode
        self._order = self._known.get(mode) or self._guess(mode)
        self._may_look_ahead = next_is_same and mode != TRAIN
        self._position = 0
        self._lower(resident)
        return self._due()

    def _guess(self, mode: str) -> tuple[Action, ...]:
        return training_order(self._num_units, self.lowest) if mode == TRAIN else forward_order(self._num_units)

    def end(self) -> None:
        """Close the step: its order is what the next step of this mode is expected to do."""
        if self._mode is not None and self._trace:
            self._known[self._mode] = tuple(self._trace)
        self._mode, self._trace, self.plan = None, [], None
        self._num_forwards.clear()

    def before(self, use: Action, resident: Callable[[], Iterable[int]]) -> list[Action]:
        """Note a use; return what the plan moves before it. ``resident`` is asked only if a new plan must be made."""
        if self._mode is None:
            return []
        self._trace.append(use)
        self._num_forwards[use.unit] += use.op is Op.FORWARD
        due = self._due()
        if self.plan is not None and self._position < len(self._order) and self._order[self._position] == use:
            self._position += 1
            self._cursor += 1
            return due
        return self._resume_at(use, resident)

    def after(self, use: Action) -> list[Action]:
        """Return what the plan moves now that a use has computed."""
        return self._due() if self._trace and self._trace[-1] == use else []

    def replan(self, resident: Iterable[int]) -> list[Action]:
        """Make the plan of the rest of the step anew, because what is on the device is not what it assumed."""
        if self._mode is None or self._position >= len(self._order):
            return []
        self._lower(resident)
        return self._due()

    def next_uses(self) -> dict[int, int]:
        """How many uses from now each unit is needed; units that the rest of the order does not need are missing."""
        distance: dict[int, int] = {}
        for steps, use in enumerate(self._order[self._position :]):
            distance.setdefault(use.unit, steps)
        return distance

    def will_evict(self, unit: int) -> bool:
        """Whether the rest of the plan evicts a unit."""
        return any(action.op is Op.EVICT and action.unit == unit for action in self._rest())

    def next_loads(self) -> Iterator[int]:
        """Units that the rest of the plan loads, in its order."""
        return (action.unit for action in self._rest() if action.op is Op.PREFETCH)

    def _rest(self) -> Sequence[Action]:
        return () if self.plan is None else self.plan.actions[self._cursor :]

    def num_forwards(self, unit: int) -> int:
        """How many times a unit has computed its forward in this step."""
        return self._num_forwards[unit]

    def first_needed(self) -> tuple[int, ...]:
        """All units, in the order in which a training step is expected to need them for the first time."""
        order = self._trace if self._mode == TRAIN and self._trace else self._known.get(TRAIN, ())
        return tuple(dict.fromkeys((*(use.unit for use in order), *range(self._num_units))))

    def _resume_at(self, use: Action, resident: Callable[[], Iterable[int]]) -> list[Action]:
        self.num_deviations += 1
        found = _find(self._order, use, self._position)
        if found is None:
            found = _find(self._order, use, 0)
        if found is None:
            return []
        self._position = found
        self._lower(resident())
        due = self._due()
        self._position += 1
        self._cursor += 1
        return due

    def _lower(self, resident: Iterable[int]) -> None:
        order = self._order[self._position :]
        is_forward_only = all(use.op is Op.FORWARD for use in order)
        keep = forward_keep(order, self._k, self._k_prime) if is_forward_only else self._keep
        self.plan = lower_window(
            order,
            k=self._k,
            k_prime=self._k_prime,
            resident=frozenset(resident),
            keep=keep,
            cyclic=self._may_look_ahead and self._position == 0,
        )
        self._cursor = 0

    def _due(self) -> list[Action]:
        """Take the moves up to the next use."""
        if self.plan is None:
            return []
        actions, start = self.plan.actions, self._cursor
        while self._cursor < len(actions) and actions[self._cursor].op not in _USES:
            self._cursor += 1
        return list(actions[start : self._cursor])


def _find(order: tuple[Action, ...], use: Action, start: int) -> int | None:
    try:
        return order.index(use, start)
    except ValueError:
        return None
