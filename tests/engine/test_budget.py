"""The window under a budget: what fits, and what the refusal says."""

from __future__ import annotations

import re

import pytest

from lightning_superpipe.errors import BudgetError
from lightning_superpipe.planning.budget import AUTO_K, MemoryNeed, choose_k

NEED = MemoryNeed(slot_bytes=100, largest_unit="net.h.7", anchor_bytes=30, num_units=12)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_need_is_slots_and_anchors_and_two_units_of_gradients(k: int, trains: bool) -> None:
    need = MemoryNeed(100, "net.h.7", 30, num_units=12, trains=trains)
    assert need.total(k) == 100 * k + 30 + (200 if trains else 0)


def test_one_more_slot_costs_exactly_one_slot() -> None:
    assert {NEED.total(k + 1) - NEED.total(k) for k in range(1, 12)} == {NEED.slot_bytes}


@pytest.mark.parametrize(
    ("k", "num_units", "k_prime", "chosen"),
    [(None, 12, 1, AUTO_K), (None, 12, 4, 5), (None, 2, 1, 2), (7, 12, 1, 7), (99, 12, 1, 12), (1, 12, 1, 1)],
)
def test_without_a_budget_the_window_is_as_asked(k: int | None, num_units: int, k_prime: int, chosen: int) -> None:
    need = MemoryNeed(100, "net.h.7", 30, num_units)
    assert choose_k(k, need, None, k_prime=k_prime) == chosen


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_exact_need_fits_and_one_byte_less_does_not(k: int) -> None:
    assert choose_k(k, NEED, NEED.total(k), k_prime=1) == k
    with pytest.raises(BudgetError):
        choose_k(k, NEED, NEED.total(k) - 1, k_prime=1)


@pytest.mark.parametrize("budget", range(0, 700, 10))
def test_automatic_window_is_the_largest_that_fits_up_to_the_default(budget: int) -> None:
    fits = [k for k in range(1, AUTO_K + 1) if NEED.total(k) <= budget]
    if fits:
        assert choose_k(None, NEED, budget, k_prime=1) == max(fits)
    else:
        with pytest.raises(BudgetError):
            choose_k(None, NEED, budget, k_prime=1)


def test_refusal_has_the_numbers_and_the_window_that_fits() -> None:
    with pytest.raises(BudgetError) as refusal:
        choose_k(6, NEED, 530, k_prime=1)
    text = str(refusal.value)
    for part in ("k=6", "830 bytes", "530 bytes", "'net.h.7'", "100 Bytes", "30 Bytes of anchors", "Use k<=3"):
        assert part in text, f"{part!r} is missing in: {text}"


def test_advice_of_a_refusal_can_be_followed() -> None:
    for k, budget, k_prime in [(6, 530, 1), (6, 400, 2), (6, 240, 1), (5, 90, 1), (None, 300, 1)]:
        with pytest.raises(BudgetError) as refusal:
            choose_k(k, NEED, budget, k_prime=k_prime)
        text = str(refusal.value)
        if fits := re.search(r"Use k<=(\d+)", text):
            assert choose_k(int(fits[1]), NEED, budget, k_prime=k_prime) == int(fits[1])
        allowed = re.search(r"allow (?:at least )?(\d+) bytes", text)
        assert allowed is not None, text
        smallest = choose_k(k if fits else None, NEED, int(allowed[1]), k_prime=k_prime)
        assert smallest >= k_prime


def test_unit_larger_than_the_budget_is_named() -> None:
    with pytest.raises(BudgetError, match=r"'net\.h\.7' alone is larger than the budget.*smaller units"):
        choose_k(None, NEED, 99, k_prime=1)


def test_no_window_fits_for_a_large_transfer() -> None:
    with pytest.raises(BudgetError, match=r"No k fits with k_prime=4: allow at least 630 bytes"):
        choose_k(None, NEED, 600, k_prime=4)


def test_model_without_streamed_bytes_fits_by_its_anchors_alone() -> None:
    need = MemoryNeed(slot_bytes=0, largest_unit="a", anchor_bytes=30, num_units=2)
    assert choose_k(None, need, 30, k_prime=1) == 2
    with pytest.raises(BudgetError):
        choose_k(None, need, 29, k_prime=1)
