"""Promises to chains of units, tried on every small shape."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lightning_superpipe.planning import (
    check_plan,
    forward_keep,
    forward_order,
    lower_window,
    parse_actions,
    residency,
    training_order,
)

from .reference import belady_loads, counted_lowering, num_computing_before, small_shapes, transfers

every_shape = pytest.mark.parametrize(("num_units", "k", "k_prime"), small_shapes(max_units=8))


@every_shape
def test_training_plan_is_valid_and_never_holds_more_than_k_units(num_units, k, k_prime):
    plan = lower_window(training_order(num_units), k=k, k_prime=k_prime)
    check_plan(plan, training_order(num_units))
    assert max(residency(plan)) == min(k, num_units)
    assert parse_actions(str(plan)) == plan.actions


@every_shape
def test_training_loads_are_the_fewest_possible(num_units, k, k_prime):
    order, window = training_order(num_units), min(k, num_units)
    for resident, loads in ((range(0), 2 * num_units - window), (range(window), 2 * num_units - 2 * window)):
        plan = lower_window(order, k=k, k_prime=k_prime, resident=resident)
        assert plan.num_loads == loads == belady_loads(order, k, resident)
        assert plan.final_resident == set(range(window))


@every_shape
def test_turn_reloads_nothing(num_units, k, k_prime):
    plan = lower_window(training_order(num_units), k=k, k_prime=k_prime)
    backward_loads = [unit for num_uses, coming in transfers(plan) for unit in coming if num_uses > num_units]
    assert sorted(backward_loads) == list(range(max(0, num_units - k)))


@every_shape
@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("make_order", [training_order, forward_order])
def test_chain_moves_k_prime_units_after_k_prime_have_computed(num_units, k, k_prime, make_order, cyclic):
    order = make_order(num_units)
    for resident in (range(0), range(min(k, num_units))):
        plan = lower_window(order, k=k, k_prime=k_prime, resident=resident, cyclic=cyclic)
        assert plan.actions == counted_lowering(order, k, k_prime, resident, cyclic)


@every_shape
def test_k_minus_k_prime_units_compute_during_each_transfer(num_units, k, k_prime):
    order = training_order(num_units)
    plan = lower_window(order, k=k, k_prime=k_prime)
    for num_uses, coming in transfers(plan):
        if num_uses > 0:
            assert len(coming) <= k_prime
            assert num_computing_before(order, num_uses, coming[0]) == k - k_prime


@every_shape
def test_repeated_forward_loads_each_streamed_unit_once_a_pass(num_units, k, k_prime):
    order = forward_order(num_units)
    keep = forward_keep(order, k, k_prime)
    plans, resident = [], frozenset()
    for _ in range(2 + k_prime):
        plan = lower_window(order, k=k, k_prime=k_prime, resident=resident, keep=keep, cyclic=True)
        check_plan(plan, order)
        plans.append(plan)
        resident = plan.final_resident
        assert keep <= resident
    steady = plans[2:]
    if k >= num_units:
        assert plans[0].num_loads == num_units
        assert not keep and sum(plan.num_loads for plan in steady) == 0
    elif num_units - k >= k_prime:
        # A batch may straddle two passes, but k_prime passes hold whole batches.
        assert sum(plan.num_loads for plan in steady) == k_prime * (num_units - len(keep))
    if k_prime == 1 and 2 <= k < num_units:
        assert [plan.num_loads for plan in steady] == [num_units - k + 2]


@every_shape
def test_kept_units_are_spread_evenly_and_leave_the_fewest_slots_that_overlap(num_units, k, k_prime):
    keep = sorted(forward_keep(forward_order(num_units), k, k_prime))
    if k >= num_units:
        assert keep == []
        return
    assert len(keep) == max(0, k - min(k, k_prime + 1))
    gaps = [after - before for before, after in pairwise([*keep, *(num_units + unit for unit in keep[:1])])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_reused_units_count_once_for_keep():
    albert = parse_actions("F0 " + "F1 " * 12 + "F2")
    assert forward_keep(albert, k=3, k_prime=1) == frozenset()
    assert forward_keep(parse_actions("F5 F9 F9 F7 F9 F3 F1"), k=4, k_prime=1) == {5, 7}


@pytest.mark.parametrize("k", [1, 2, 24, 199, 200, 300])
@pytest.mark.parametrize("k_prime", [1, 2, 200])
def test_two_hundred_units(k, k_prime):
    k_prime = min(k, k_prime)
    plan = lower_window(training_order(200), k=k, k_prime=k_prime)
    check_plan(plan, training_order(200))
    assert plan.num_loads == 400 - min(k, 200)
