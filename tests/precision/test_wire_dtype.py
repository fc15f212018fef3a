"""A narrower wire gives the numbers of an ordinary loop with a copy in that dtype, and moves half the bytes."""

from __future__ import annotations

import pytest
import torch

from tests.precision.loops import Plan, assert_same, streamed, wired
from tests.precision.modules import MODULES, chain_case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ["cpu", pytest.param("emu:0", marks=pytest.mark.emu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(MODULES))
def test_training_equals_the_loop_with_a_narrow_copy(name: str, dtype: str, device: str) -> None:
    case = MODULES[name]
    assert_same(streamed(case, device=device, wire_dtype=dtype), wired(case, DTYPES[dtype], device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("update", ["after_backward", "at_once"])
@pytest.mark.parametrize("window", [(1, 1), (2, 1), (3, 2), (9, 3)], ids=str)
def test_every_window_gives_the_same_numbers(window: tuple[int, int], update: str, device: str) -> None:
    case, (k, k_prime) = chain_case(5), window
    candidate = streamed(case, device=device, wire_dtype="bfloat16", k=k, k_prime=k_prime, update=update)
    assert_same(candidate, wired(case, torch.bfloat16, device=device))


PLANS = [
    Plan("adamw"),
    Plan("momentum"),
    Plan("adafactor"),
    Plan(accumulate=2),
    Plan(clip=0.05),
    Plan("adamw", accumulate=2, clip=0.05),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_optimizers_accumulation_and_clipping_work_on_the_masters(plan: Plan, device: str) -> None:
    case = MODULES["tied"]
    candidate = streamed(case, device=device, plan=plan, wire_dtype="bfloat16")
    assert_same(candidate, wired(case, torch.bfloat16, device=device, plan=plan))
