"""Updates in backward use gradients and options early: what changes them afterwards is refused, not overlooked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.optimizer import promise, stage
from tests.disk.loops import Left, left, make

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_GOOD, NUM_ALL = 3, 5
HOST = {"adversary": Adversary(max_delay_ms=0.1)}  # what is late needs threads of its own
DISK = {"store": "disk"}
Change = Callable[[nn.Module, torch.optim.Optimizer], None]


def clip(model: nn.Module, _: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def replace(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad.clone() if parameter.grad is not None else None


def drop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def slow_down(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def look(model: nn.Module, _: torch.optim.Optimizer) -> None:
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def step(model: Any, optimizer: Any, number: int, pipe: Any, change: Change | None = None) -> float:
    """A step that is announced where ``pipe`` is given; something is changed between backward and step."""
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(number))
    loss = model(x).pow(2).mean()
    with contextlib.nullcontext() if pipe is None else pipe.updating(optimizer):
        loss.backward()
        if change is not None:
            change(model, optimizer)
        optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def after(num_steps: int) -> Left:
    model, optimizer = make()
    for number in range(num_steps):
        step(model, optimizer, number, None)
    return left(model, optimizer)


@pytest.mark.parametrize("change", [clip, replace, drop, slow_down])
def test_step_on_other_gradients_or_options_is_refused_and_undone_where_that_can_be(change: Change) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, **DISK) as pipe:
        for number in range(NUM_GOOD):
            step(model, optimizer, number, pipe)
        what = "options of AdamW" if change is slow_down else "gradients of unit 'blocks"
        with pytest.raises(SuperpipeError, match=f"{what}.* were changed .*those of the last finished one"):
            step(model, optimizer, NUM_GOOD, pipe, change)
        assert left(model, optimizer).equals(after(NUM_GOOD))
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.zero_grad()
        for number in range(NUM_GOOD, NUM_ALL):
            step(model, optimizer, number, pipe)
    assert left(model, optimizer).equals(after(NUM_ALL))


@pytest.mark.parametrize("change", [clip, slow_down])
def test_refusal_says_how_many_units_stay_updated(change: Change) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, **HOST) as pipe:
        for number in range(NUM_GOOD):
            step(model, optimizer, number, pipe)
        with pytest.raises(SuperpipeError, match=r"[1-6] of 6 units have been updated .* last checkpoint"):
            step(model, optimizer, NUM_GOOD, pipe, change)


@pytest.mark.parametrize("options", [HOST, DISK], ids=["host", "disk"])
def test_who_only_looks_breaks_no_promise(options: dict[str, Any]) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, **options) as pipe:
        for number in range(NUM_ALL):
            step(model, optimizer, number, pipe, look)
    assert left(model, optimizer).equals(after(NUM_ALL))


@pytest.mark.parametrize("options", [HOST, DISK], ids=["host", "disk"])
def test_without_the_question_numbers_would_be_wrong(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, promise.require_promise.__name__, lambda *_: None)
    found = []
    for is_streamed in (False, True):
        model, optimizer = make()
        scope = attach(model, optimizer, device="cpu", k=2, **options) if is_streamed else contextlib.nullcontext()
        with scope as pipe:
            for number in range(NUM_ALL):
                step(model, optimizer, number, pipe, clip)
        found.append(left(model, optimizer))
    assert not found[0].equals(found[1])
