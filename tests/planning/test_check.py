"""Each rule refuses a plan that breaks it, and the message marks the guilty action."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning import (
    Op,
    Plan,
    check_plan,
    lower_window,
    parse_actions,
    residency,
    training_order,
)

from .strategies import requests, thorough

GOOD = lower_window(training_order(4), k=2, k_prime=1)  # P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0


def refusal(plan, order=None):
    """The message of the error that a plan must raise."""
    with pytest.raises(PlanError) as caught:
        check_plan(plan, order)
    return str(caught.value)


def marked(message):
    """Where the shown plan is marked: (words before the mark, the marked word)."""
    shown = message.split("\n")[1].split()
    marks = [(index, word[2:-2]) for index, word in enumerate(shown) if re.fullmatch(">>.*<<", word)]
    assert len(marks) == 1
    return marks[0]


def changed(text, **changes):
    return dataclasses.replace(GOOD, actions=parse_actions(text), **changes)


@pytest.mark.parametrize(
    ("plan", "rule", "position", "guilty"),
    [
        # E0 is missing.
        (
            changed("P0 P1 F0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0"),
            "more than k=2 units on the device (there already: 0, 1)",
            3,
            "P2",
        ),
        # P2 is missing.
        (
            changed("P0 P1 F0 E0 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0"),
            "use of a unit that is not on the device (there already: 3)",
            7,
            "F2",
        ),
        # P1 comes too late in the backward.
        (changed("P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 B2 E2 P0 B1 P1 B0"), "use of a unit that is not on", 15, "B1"),
        # E0 twice.
        (changed("P0 P1 F0 E0 E0 P2"), "evict of a unit that is not on the device (there already: 1)", 4, "E0"),
        # P0 twice.
        (changed("P0 P0 F0"), "prefetch of a unit that is on the device (there already: 0)", 1, "P0"),
        (changed("P0 F0", resident=frozenset({0})), "prefetch of a unit that is on the device", 0, "P0"),
        # One unit fewer than the plan uses.
        (dataclasses.replace(GOOD, num_units=3), "unit index out of range: the plan has 3 units", 7, "P3"),
        (changed("P0 F0 G4"), "unit index out of range: the plan has 4 units", 2, "G4"),
        # A kept unit leaves.
        (dataclasses.replace(GOOD, keep=frozenset({1})), "evict of a unit that is kept for good", 6, "E1"),
    ],
)
def test_broken_rule_is_named_and_its_action_is_marked(plan, rule, position, guilty):
    message = refusal(plan)
    assert rule in message
    assert message.startswith(f"action {position + 1} of {len(plan.actions)}, {guilty}: ")
    assert marked(message) == (position, guilty)
    assert message.split("\n")[1].replace(">>", "").replace("<<", "").strip() == str(plan)


@pytest.mark.parametrize(
    ("order", "rule", "position", "guilty"),
    [
        ("F0 F1 F2 F3 B3 B1 B2 B0", "use 6 of the order is B1", 13, "B2"),
        ("F0 F1 F2 F3 B3 B2 B1", "the order has only 7 uses and ends before this one", 17, "B0"),
        ("F0 F1 F2 F3 B3 B2 B1 B0 F0", "use 9 of the order, F0, is missing", 18, "end"),
        ("", "the order has only 0 uses", 2, "F0"),
    ],
)
def test_uses_that_differ_from_the_order_are_marked(order, rule, position, guilty):
    check_plan(GOOD)
    check_plan(GOOD, training_order(4))
    message = refusal(GOOD, parse_actions(order))
    assert rule in message
    assert marked(message) == (position, guilty)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"k_prime": 3}, "k=2 and k_prime=3: allowed is 1 <= k_prime <= k"),
        ({"k_prime": 0}, "k=2 and k_prime=0"),
        ({"resident": frozenset({0, 1, 2})}, "more than k=2 units are on the device at the start: 0, 1, 2"),
        ({"resident": frozenset({4})}, "unit 4 is on the device at the start, but its index is out of range"),
        ({"resident": frozenset({-1})}, "unit -1 is on the device at the start"),
    ],
)
def test_impossible_start_is_refused(changes, rule):
    message = refusal(dataclasses.replace(GOOD, **changes))
    assert rule in message and message.endswith(f"\n  {GOOD}")


def test_long_plan_is_shown_around_the_mark():
    plan = lower_window(training_order(200), k=2, k_prime=1)
    position = next(index for index, (op, unit) in enumerate(plan.actions) if (op, unit) == (Op.PREFETCH, 100))
    message = refusal(dataclasses.replace(plan, actions=plan.actions[:position] + plan.actions[position + 1 :]))
    shown = message.split("\n")[1].split()
    assert (shown[0], shown[-1], len(shown)) == ("...", "...", 43)
    assert shown[21] == ">>F100<<"


def test_every_action_of_a_plan_is_needed():
    for index, action in enumerate(GOOD.actions):
        missing = dataclasses.replace(GOOD, actions=GOOD.actions[:index] + GOOD.actions[index + 1 :])
        assert action.is_use or index <= marked(refusal(missing, GOOD.uses))[0]


@thorough
@given(requests(cyclic=False), st.data())
def test_dropping_or_doubling_any_action_is_refused(asked, data):
    plan = asked.lower()
    assume(plan.actions)
    index = data.draw(st.integers(0, len(plan.actions) - 1))
    dropped = plan.actions[:index] + plan.actions[index + 1 :]
    doubled = plan.actions[: index + 1] + plan.actions[index:]
    for actions in (dropped, doubled):
        marked(refusal(dataclasses.replace(plan, actions=actions), asked.order))


@thorough
@given(requests(cyclic=False), st.data())
def test_a_transfer_moved_past_the_use_that_needs_it_is_refused(asked, data):
    plan = asked.lower()
    late = [
        (index, use)
        for index, action in enumerate(plan.actions)
        if action.op is Op.PREFETCH
        for use, later in enumerate(plan.actions)
        if use > index and later.is_use and later.unit == action.unit
    ]
    assume(late)
    index, use = data.draw(st.sampled_from(late))
    actions = [*plan.actions[:index], *plan.actions[index + 1 : use + 1], plan.actions[index], *plan.actions[use + 1 :]]
    message = refusal(dataclasses.replace(plan, actions=tuple(actions)))
    assert "use of a unit that is not on the device" in message
    assert marked(message)[1][1:] == str(plan.actions[index].unit)


def test_residency_counts_units_on_the_device_after_each_action():
    assert residency(GOOD) == (1, 2, 2, 1, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 1, 2, 2, 2)
    assert residency(Plan((), k=1, k_prime=1, num_units=0)) == ()
    assert residency(changed("F0 E1", resident=frozenset({0, 1}))) == (2, 1)
