from __future__ import annotations

from fractions import Fraction

import pytest

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning import (
    forward_keep,
    forward_order,
    loads_forward,
    loads_training,
    loads_unchanged,
    lower_window,
    training_order,
)

from .reference import small_shapes

every_shape = pytest.mark.parametrize(("num_units", "k", "k_prime"), small_shapes(max_units=8))


@every_shape
def test_training_formulas_count_the_plan(num_units, k, k_prime):
    order = training_order(num_units)
    assert lower_window(order, k=k, k_prime=k_prime).num_loads == loads_training(num_units, k)
    first = range(min(k, num_units))
    assert lower_window(order, k=k, k_prime=k_prime, resident=first).num_loads == loads_unchanged(num_units, k)


@every_shape
def test_forward_formula_is_the_mean_of_repeated_passes(num_units, k, k_prime):
    order = forward_order(num_units)
    keep = forward_keep(order, k, k_prime)
    loads, resident, passes = [], frozenset(), {}
    while resident not in passes:
        passes[resident] = len(passes)
        plan = lower_window(order, k=k, k_prime=k_prime, resident=resident, keep=keep, cyclic=True)
        loads.append(plan.num_loads)
        resident = plan.final_resident
    steady = loads[passes[resident] :]
    mean, formula = Fraction(sum(steady), len(steady)), loads_forward(num_units, k, k_prime)
    assert formula - 1 < mean <= formula
    if num_units - k >= k_prime:
        assert mean == formula
    if k_prime == 1:
        assert set(steady) == {formula}


def test_formulas_refuse_impossible_shapes():
    for formula in (loads_training, loads_unchanged, loads_forward):
        with pytest.raises(PlanError, match="n=-1"):
            formula(-1, 1)
        with pytest.raises(PlanError, match="k=0"):
            formula(4, 0)
    with pytest.raises(PlanError, match="k_prime=3 with k=2"):
        loads_forward(4, 2, 3)
