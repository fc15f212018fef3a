from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning import (
    Action,
    Op,
    Plan,
    distinct_units,
    format_actions,
    forward_order,
    lower_window,
    parse_actions,
    training_order,
)

actions = st.lists(st.builds(Action, st.sampled_from(Op), st.integers(0, 10**9 - 1))).map(tuple)


@given(actions)
def test_text_form_reads_back_equal(actions):
    assert parse_actions(format_actions(actions)) == actions


def test_text_form_is_one_letter_and_the_unit():
    every = tuple(Action(op, unit) for unit, op in enumerate(Op))
    assert format_actions(every) == "P0 F1 B2 E3 G4 U5"
    assert parse_actions("  P0\n F1\tB2 E3 G4 U5 ") == every
    assert parse_actions("") == ()


@pytest.mark.parametrize("word", ["p0", "X1", "P", "0P", "P-1", "P01", "P1,", "PF0", "P1.0", "P٣", "F1234567890"])
def test_bad_word_is_named_with_its_position(word):
    with pytest.raises(PlanError, match=r"^word 3, ") as caught:
        parse_actions(f"P0 F0 {word} B0")
    assert repr(word) in str(caught.value)


def test_only_forward_and_backward_are_uses():
    assert [op.value for op in Op if Action(op, 0).is_use] == ["F", "B"]


def test_orders_of_a_chain():
    assert format_actions(forward_order(3)) == "F0 F1 F2"
    assert format_actions(training_order(3)) == "F0 F1 F2 B2 B1 B0"
    assert forward_order(0) == training_order(0) == ()
    for order in (forward_order, training_order):
        with pytest.raises(PlanError, match="num_units=-1"):
            order(-1)


def test_distinct_units_are_sorted_by_first_use():
    assert distinct_units(parse_actions("F3 F1 F3 F0 B0 B1")) == (3, 1, 0)


def test_plan_prints_counts_and_compares_as_its_text():
    plan = lower_window(training_order(3), k=2, k_prime=1)
    assert str(plan) == "P0 P1 F0 E0 P2 F1 F2 B2 E2 P0 B1 B0"
    assert plan.num_loads == 4
    assert plan.final_resident == {0, 1}
    assert plan.uses == training_order(3)
    same = Plan(parse_actions(str(plan)), k=2, k_prime=1, num_units=3)
    assert same == plan and hash(same) == hash(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_gradient_and_update_move_no_weights():
    plan = Plan(parse_actions("P0 F0 B0 G0 E0 U0"), k=1, k_prime=1, num_units=1)
    assert (plan.num_loads, plan.final_resident, format_actions(plan.uses)) == (1, frozenset(), "F0 B0")
