"""Promises to any order whatever: reused units, skips, several passes, recomputation, forward and backward mixed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning import (
    Action,
    Op,
    check_plan,
    distinct_units,
    forward_keep,
    forward_order,
    lower_window,
    parse_actions,
    residency,
    training_order,
)

from .reference import belady_loads, num_computing_before, num_runs, slow_lowering, transfers
from .strategies import Request, orders, requests, thorough


@thorough
@given(requests())
def test_plan_is_valid_and_computes_the_order_unchanged(asked):
    plan = asked.lower()
    check_plan(plan, asked.order)
    assert plan.uses == asked.order
    assert max(residency(plan), default=0) <= asked.k
    assert parse_actions(str(plan)) == plan.actions


@thorough
@given(requests())
def test_plan_equals_the_rule_searched_anew_at_every_use(asked):
    assert asked.lower().actions == slow_lowering(*asked)


@thorough
@given(requests())
def test_equal_arguments_give_the_same_plan_object(asked):
    plan = asked.lower()
    assert plan is asked.lower()
    copied = Request(tuple(Action(*use) for use in asked.order), *asked[1:])
    assert copied.lower() is plan


@thorough
@given(requests())
def test_every_load_is_used_before_it_is_evicted(asked):
    fresh: set[int] = set()
    plan = asked.lower()
    for action in plan.actions:
        if action.op is Op.PREFETCH:
            fresh.add(action.unit)
        elif action.is_use:
            fresh.discard(action.unit)
        else:
            assert action.unit not in fresh
    # Only the next pass may need what was not used.
    assert not fresh or asked.cyclic
    assert fresh <= set(distinct_units(asked.order))


@thorough
@given(requests(cyclic=False))
def test_loads_lie_between_the_fewest_possible_and_one_per_change_of_unit(asked):
    plan = asked.lower()
    assert belady_loads(asked.order, asked.k, asked.resident) <= plan.num_loads <= num_runs(asked.order)


@thorough
@given(requests(cyclic=True))
def test_next_pass_costs_at_most_one_window_more(asked):
    assert asked.lower().num_loads <= num_runs(asked.order) + asked.k


@thorough
@given(requests(cyclic=False, with_keep=False))
def test_what_fits_is_loaded_once(asked):
    used = frozenset(distinct_units(asked.order))
    plan = asked._replace(k=max(asked.k, len(used))).lower()
    assert plan.num_loads == len(used - plan.resident)


@thorough
@given(requests(with_keep=False))
def test_k_minus_k_prime_units_compute_during_each_transfer(asked):
    future = asked.order * (2 if asked.cyclic else 1)
    for num_uses, coming in transfers(asked.lower()):
        if num_uses > 0:
            assert len(coming) <= asked.k_prime
            assert num_computing_before(future, num_uses, coming[0]) == asked.k - asked.k_prime


@thorough
@given(requests(with_keep=False))
def test_k_prime_equal_to_k_overlaps_nothing(asked):
    future = asked.order * (2 if asked.cyclic else 1)
    for num_uses, coming in transfers(asked._replace(k_prime=asked.k).lower()):
        if num_uses > 0:
            assert coming[0] == future[num_uses].unit, "the very next use waits for the transfer"


@thorough
@given(requests())
def test_kept_units_are_loaded_at_most_once_and_stay(asked):
    plan = asked.lower()
    for unit in asked.keep:
        num_loads = plan.actions.count(Action(Op.PREFETCH, unit))
        used = unit in distinct_units(asked.order)
        assert num_loads == (used and unit not in asked.resident)
        assert (unit in plan.final_resident) == (used or unit in asked.resident)


@thorough
@given(requests(with_keep=False))
def test_nobody_leaves_for_a_unit_that_is_needed_later(asked):
    plan = asked.lower()
    future = asked.order * (2 if asked.cyclic else 1)
    num_uses, leaving, coming = 0, list[int](), list[int]()
    for previous, action in pairwise((Action(Op.PREFETCH, -1), *plan.actions, Action(Op.FORWARD, -1))):
        if leaving and coming and (action.is_use or (action.op, previous.op) == (Op.EVICT, Op.PREFETCH)):
            assert len(leaving) == len(coming)
            for goes, comes in zip(leaving, coming, strict=True):
                needed = [use.unit for use in future[num_uses:]]
                assert goes not in needed or needed.index(goes) > needed.index(comes)
            leaving, coming = [], []
        if action.op is Op.EVICT:
            leaving.append(action.unit)
        elif action.op is Op.PREFETCH and leaving:
            coming.append(action.unit)
        num_uses += action.is_use


@thorough
@given(orders(), st.integers(1, 9), st.data())
def test_repeated_passes_are_valid_from_wherever_the_last_one_ended(order, k, data):
    k_prime = data.draw(st.integers(1, k))
    keep, resident = forward_keep(order, k, k_prime), frozenset()
    for _ in range(4):
        plan = lower_window(order, k=k, k_prime=k_prime, resident=resident, keep=keep, cyclic=True)
        check_plan(dataclasses.replace(plan, resident=resident), order)
        resident = plan.final_resident
    if k >= len(distinct_units(order)):
        assert plan.num_loads == 0


@given(requests())
def test_any_iterables_are_accepted(asked):
    plan = lower_window(
        iter(asked.order),
        k=asked.k,
        k_prime=asked.k_prime,
        resident=sorted(asked.resident),
        keep=set(asked.keep),
        cyclic=asked.cyclic,
    )
    assert plan is asked.lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0, "k_prime": 1}, r"k=0: .* Use k>=1"),
        ({"k": 2, "k_prime": 0}, r"k_prime=0 with k=2: .* Use 1<=k_prime<=2"),
        ({"k": 2, "k_prime": 3}, r"k_prime=3 with k=2"),
        ({"k": 2, "k_prime": 1, "resident": {0, 1, 2}}, r"3 units are on the device at the start \(0, 1, 2\), but k=2"),
        ({"k": 2, "k_prime": 1, "resident": {-1}}, r"unit -1 in resident or keep"),
        ({"k": 2, "k_prime": 1, "keep": {-3, 1}}, r"unit -3 in resident or keep"),
        ({"k": 2, "k_prime": 1, "keep": {0, 2}}, r"keep holds 2 units \(0, 2\) and k=2: .* Keep at most 1"),
        ({"k": 1, "k_prime": 1, "keep": {0, 1, 2, 3}}, r"keep holds 4 units"),
    ],
)
def test_impossible_request_is_refused_with_its_numbers(options, message):
    with pytest.raises(PlanError, match=message):
        lower_window(forward_order(4), **options)


@pytest.mark.parametrize("text", ["F0 P1 F1", "F0 E0", "G0", "F0 U0"])
def test_order_holds_uses_only(text):
    with pytest.raises(PlanError, match="is not a use"):
        lower_window(parse_actions(text), k=1, k_prime=1)


@pytest.mark.parametrize(
    ("order", "resident", "keep", "num_units"),
    [("", (), (), 0), ("F3 F1", (), (), 4), ("F0", {5}, (), 6), ("F0", {2}, {7}, 8)],
)
def test_plan_numbers_every_unit_named(order, resident, keep, num_units):
    plan = lower_window(parse_actions(order), k=2, k_prime=1, resident=resident, keep=keep)
    assert plan.num_units == num_units


def test_keep_may_fill_all_slots_if_nothing_else_is_used():
    plan = lower_window(training_order(2), k=2, k_prime=1, keep={0, 1}, resident={1, 5})
    assert str(plan) == "E5 P0 F0 F1 B1 B0"
    # Kept units that take no part take no slot.
    plan = lower_window(forward_order(2), k=1, k_prime=1, keep={5, 6})
    assert str(plan) == "P0 F0 E0 P1 F1"
