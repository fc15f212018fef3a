"""The follower: expects the order of the last step, moves what the plan says, and finds back after a deviation."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from lightning_superpipe.engine.follower import TRAIN, Follower
from lightning_superpipe.planning import Action, format_actions, forward_order, parse_actions, training_order


class Device:
    """Carries out what a follower moves, as the engine does, and loads on demand."""

    def __init__(self, follower: Follower, k: int) -> None:
        self.follower, self.k = follower, k
        self.resident: set[int] = set()
        self.log: list[str] = []
        self.num_misses = self.num_loads = 0

    def move(self, actions: Iterable[Action]) -> None:
        for action in actions:
            self.log.append(str(action))
            if action.op.value == "E":
                self.resident.discard(action.unit)
            elif len(self.resident) < self.k and action.unit not in self.resident:
                self.resident.add(action.unit)
                self.num_loads += 1

    def use(self, use: Action) -> None:
        self.move(self.follower.before(use, lambda: sorted(self.resident)))
        if use.unit not in self.resident:
            self.num_misses += 1
            self.num_loads += 1
            if len(self.resident) == self.k:
                next_uses = self.follower.next_uses()
                self.resident.remove(max(self.resident, key=lambda unit: next_uses.get(unit, 99)))
            self.resident.add(use.unit)
        self.log.append(str(use))
        self.move(self.follower.after(use))

    def step(self, mode: str, uses: str | tuple[Action, ...], *, keeps: bool = False) -> str:
        """Run one step and return all that happened, in order."""
        if not keeps:
            self.resident.clear()
        self.log.clear()
        self.move(self.follower.begin(mode, sorted(self.resident), next_is_same=keeps))
        for use in parse_actions(uses) if isinstance(uses, str) else uses:
            self.use(use)
        self.follower.end()
        return " ".join(self.log)


def device(num_units: int, k: int, k_prime: int = 1) -> Device:
    return Device(Follower(num_units, k, k_prime), k)


def test_first_step_expects_the_order_of_registration() -> None:
    it = device(4, k=2)
    assert it.step(TRAIN, training_order(4)) == "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0"
    assert (it.num_misses, it.follower.num_deviations) == (0, 0)


def test_another_order_deviates_once_and_is_planned_from_then_on() -> None:
    it = device(4, k=2)
    uses = "F2 F0 F3 F1 B1 B3 B0 B2"
    it.step(TRAIN, uses)
    assert it.follower.num_deviations > 0
    it.num_misses = it.follower.num_deviations = 0
    assert it.step(TRAIN, uses) == "P2 P0 F2 E2 P3 F0 E0 P1 F3 F1 B1 E1 P0 B3 E3 P2 B0 B2"
    assert (it.num_misses, it.follower.num_deviations) == (0, 0)


def test_each_mode_has_an_order_of_its_own() -> None:
    it = device(3, k=2)
    for _ in range(2):
        it.step(TRAIN, "F2 F1 F0 B0 B1 B2")
        it.step("validate", "F0 F2 F1")
    it.num_misses = it.follower.num_deviations = 0
    it.step(TRAIN, "F2 F1 F0 B0 B1 B2")
    it.step("validate", "F0 F2 F1")
    assert (it.num_misses, it.follower.num_deviations) == (0, 0)


@pytest.mark.parametrize(
    ("expected", "happens", "most_misses"),
    [
        ("F0 F1 F2 F3 B3 B2 B1 B0", "F0 F2 F3 B3 B2 B0", 0),  # one unit is skipped
        ("F0 F1 F2 F3 B3 B2 B1 B0", "F0 F1 F1 F2 F3 B3 B2 B1 B0", 1),  # one is called twice in a row
        ("F0 F1 F2 F3 B3 B2 B1 B0", "F0 F3 F1 F2 B2 B1 B3 B0", 3),
        ("F0 F1 F2 F3 B3 B2 B1 B0", "F0 F1 F2 F3", 0),  # there is no backward
        ("F0 F1", "F0 F1 F2 F3 B3 B2 B1 B0", 5),  # the last step was shorter
    ],
)
def test_deviation_costs_little_and_the_order_is_found_again(expected: str, happens: str, most_misses: int) -> None:
    it = device(4, k=2)
    it.step(TRAIN, expected)
    it.num_misses = 0
    it.step(TRAIN, happens)
    assert it.num_misses <= most_misses


def test_deviations_are_counted_and_agreement_is_not() -> None:
    it = device(4, k=2)
    it.step(TRAIN, training_order(4))
    assert it.follower.num_deviations == 0
    it.step(TRAIN, "F0 F2 F3 B3 B2 B0")
    assert it.follower.num_deviations > 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_unit_used_several_times_in_a_row_stays_for_all_of_them(k: int) -> None:
    it = device(4, k=k)
    uses = "F0 F1 F1 F1 F2 F3 B3 B2 B1 B0"
    it.step(TRAIN, uses)
    it.num_misses = it.num_loads = it.follower.num_deviations = 0
    it.step(TRAIN, uses)
    assert (it.num_misses, it.follower.num_deviations, it.num_loads) == (0, 0, 8 - k)


def test_outside_steps_nothing_moves() -> None:
    follower = Follower(4, 2, 1)
    use = forward_order(1)[0]
    assert follower.before(use, tuple) == []
    assert follower.after(use) == []
    assert follower.replan(()) == []
    assert follower.plan is None


def test_replan_starts_from_what_is_on_the_device_now() -> None:
    follower = Follower(4, 2, 1)
    follower.begin(TRAIN, (), next_is_same=False)
    for use in forward_order(2):
        follower.before(use, tuple)
    assert format_actions(follower.replan({1})) == "P2 E1 P3"


def test_next_uses_count_from_now() -> None:
    follower = Follower(3, 2, 1)
    follower.begin(TRAIN, (), next_is_same=False)
    follower.before(Action(forward_order(1)[0].op, 0), tuple)
    assert follower.next_uses() == {1: 0, 2: 1, 0: 4}


def test_step_without_a_use_changes_no_order() -> None:
    it = device(3, k=2)
    it.step(TRAIN, "F2 F1 B1 B2")
    it.step(TRAIN, ())
    it.num_misses = 0
    it.step(TRAIN, "F2 F1 B1 B2")
    assert it.num_misses == 0


@pytest.mark.parametrize("num_units", range(2, 8))
@pytest.mark.parametrize("k", range(2, 8))
def test_undisturbed_forward_passes_load_as_the_formula_says(num_units: int, k: int) -> None:
    it = device(num_units, min(k, num_units))
    it.step("validate", forward_order(num_units))
    for _ in range(3):
        it.num_loads = 0
        it.step("validate", forward_order(num_units), keeps=True)
    assert it.num_loads == (num_units - k + 2 if k < num_units else 0)
    assert it.num_misses == 0
