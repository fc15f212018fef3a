"""Plans that a reader can check by hand. A change here is a change of what the engine does."""

from __future__ import annotations

import pytest

from lightning_superpipe.planning import forward_order, lower_window, parse_actions, training_order

TRAINING = {
    (1, 1, 1): "P0 F0 B0",
    (2, 3, 2): "P0 P1 F0 F1 B1 B0",
    (3, 1, 1): "P0 F0 E0 P1 F1 E1 P2 F2 B2 E2 P1 B1 E1 P0 B0",
    (4, 2, 1): "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0",
    (4, 2, 2): "P0 P1 F0 F1 E0 E1 P2 P3 F2 F3 B3 B2 E3 E2 P1 P0 B1 B0",
    (4, 3, 1): "P0 P1 P2 F0 E0 P3 F1 F2 F3 B3 E3 P0 B2 B1 B0",
    (4, 4, 2): "P0 P1 P2 P3 F0 F1 F2 F3 B3 B2 B1 B0",
    # The last batch of the forward is smaller, and the backward counts anew from the turn.
    (5, 3, 2): "P0 P1 P2 F0 F1 E0 E1 P3 P4 F2 F3 F4 B4 B3 E4 E3 P1 P0 B2 B1 B0",
    (7, 4, 2): (
        "P0 P1 P2 P3 F0 F1 E0 E1 P4 P5 F2 F3 E2 P6 F4 F5 F6 "
        "B6 B5 E6 E5 P2 P1 B4 B3 E4 P0 B2 B1 B0"
    ),
    (4, 3, 3): "P0 P1 P2 F0 F1 F2 E0 P3 F3 B3 B2 B1 E3 P0 B0",
}  # fmt: skip


@pytest.mark.parametrize(("num_units", "k", "k_prime"), TRAINING)
def test_training_from_an_empty_device(num_units, k, k_prime):
    plan = lower_window(training_order(num_units), k=k, k_prime=k_prime)
    assert str(plan) == TRAINING[num_units, k, k_prime]
    assert (plan.k, plan.k_prime, plan.num_units) == (k, k_prime, num_units)


@pytest.mark.parametrize(
    ("k", "k_prime", "text"),
    [
        (1, 1, "F0 E0 P1 F1 E1 P2 F2 E2 P3 F3 B3 E3 P2 B2 E2 P1 B1 E1 P0 B0"),
        (2, 1, "F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0"),
        (2, 2, "F0 F1 E0 E1 P2 P3 F2 F3 B3 B2 E3 E2 P1 P0 B1 B0"),
        (4, 1, "F0 F1 F2 F3 B3 B2 B1 B0"),
    ],
)
def test_training_with_unchanged_weights_begins_where_it_ended(k, k_prime, text):
    plan = lower_window(training_order(4), k=k, k_prime=k_prime, resident=range(k))
    assert str(plan) == text
    assert plan.final_resident == set(range(k))
    assert str(lower_window(training_order(4), k=k, k_prime=k_prime, resident=range(k), cyclic=True)) == text


@pytest.mark.parametrize(
    ("k", "k_prime", "options", "text"),
    [
        (2, 1, {}, "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3"),
        (2, 2, {}, "P0 P1 F0 F1 E0 E1 P2 P3 F2 F3"),
        (2, 1, {"cyclic": True}, "P0 P1 F0 E0 P2 F1 E1 P3 F2 E2 P0 F3 E3 P1"),
        (2, 1, {"cyclic": True, "resident": {0, 1}}, "F0 E0 P2 F1 E1 P3 F2 E2 P0 F3 E3 P1"),
        (3, 1, {"cyclic": True, "resident": {0, 1, 2}, "keep": {0}}, "F0 F1 E1 P3 F2 E2 P1 F3 E3 P2"),
        # Kept units that are not there yet come once, when it is their turn, and stay.
        (3, 1, {"keep": {3}}, "P0 P1 P2 F0 E0 P3 F1 F2 F3"),
        (3, 1, {"keep": {3}, "cyclic": True}, "P0 P1 P2 F0 E0 P3 F1 E1 P0 F2 E2 P1 F3"),
        # The last units of the pass before make room at once.
        (2, 1, {"resident": {2, 3}}, "E3 P0 E2 P1 F0 E0 P2 F1 E1 P3 F2 F3"),
        # So do units that the order does not use.
        (3, 1, {"resident": {8, 9}}, "P0 E9 P1 E8 P2 F0 E0 P3 F1 F2 F3"),
    ],
)
def test_forward_only(k, k_prime, options, text):
    assert str(lower_window(forward_order(4), k=k, k_prime=k_prime, **options)) == text


@pytest.mark.parametrize(
    ("order", "k", "k_prime", "text"),
    [
        # ALBERT: one unit computes several times in a row, and moves once.
        ("F0 F1 F1 F1 F2 B2 B1 B1 B1 B0", 2, 1, "P0 P1 F0 E0 P2 F1 F1 F1 F2 B2 E2 P0 B1 B1 B1 B0"),
        # Batches are units, not uses: two units come at a time although each computes three times.
        (
            "F0 F0 F0 F1 F1 F1 F2 F2 F2 F3 F3 F3 F4 F5",
            4,
            2,
            "P0 P1 P2 P3 F0 F0 F0 F1 F1 F1 E0 E1 P4 P5 F2 F2 F2 F3 F3 F3 F4 F5",
        ),
        # Checkpointing: every unit computes forward again just before its backward.
        (
            "F0 F1 F2 F3 F3 B3 F2 B2 F1 B1 F0 B0",
            2,
            1,
            "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 F3 B3 E3 P1 F2 B2 E2 P0 F1 B1 F0 B0",
        ),
        (
            "F0 F1 F2 F3 F4 F5 F5 B5 F4 B4 F3 B3 F2 B2 F1 B1 F0 B0",
            4,
            2,
            "P0 P1 P2 P3 F0 F1 E0 E1 P4 P5 F2 F3 F4 F5 F5 B5 F4 B4 E5 E4 P1 P0 F3 B3 F2 B2 F1 B1 F0 B0",
        ),
        # A skipped unit never moves.
        ("F0 F2 F3 B3 B2 B0", 2, 1, "P0 P2 F0 E0 P3 F2 F3 B3 E3 P0 B2 B0"),
        # Two losses in one step, as manual optimization does: generator 0 1, discriminator 2 3.
        (
            "F0 F1 F2 F3 B3 B2 B1 B0 F2 F3 B3 B2",
            2,
            1,
            "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 E1 P2 B0 E0 P3 F2 F3 B3 B2",
        ),
        # Nothing, and only one unit.
        ("", 2, 1, ""),
        ("F7 F7 B7", 3, 3, "P7 F7 F7 B7"),
    ],
)
def test_orders_from_real_life(order, k, k_prime, text):
    assert str(lower_window(parse_actions(order), k=k, k_prime=k_prime)) == text
