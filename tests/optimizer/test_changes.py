"""What a loop changes of optimizers and modules between two steps, while the update of the last one may still run."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe import attach
from tests.disk.loops import WIDTH, Left, Model, left, make

pytestmark = pytest.mark.filterwarnings("ignore")
Change = Callable[[Model, Optimizer], None]
NUM_STEPS, AT = 6, 3
OPTIONS: list[dict[str, Any]] = [{}, {"store": "disk"}, {"store": {"states": "disk"}}, {"update_on_device": 0.6}]


def new_states(_: Model, optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def no_states(_: Model, optimizer: Optimizer) -> None:
    optimizer.state.clear()


def one_without(model: Model, optimizer: Optimizer) -> None:
    del optimizer.state[model.blocks[4].down.weight]


def another_parameter(model: Model, optimizer: Optimizer) -> None:
    old = model.blocks[2].up.weight
    new = model.blocks[2].up.weight = nn.Parameter(old.detach() * 0.5)
    (group,) = optimizer.param_groups
    group["params"] = [new if each is old else each for each in group["params"]]
    optimizer.state[new] = optimizer.state.pop(old)


def train(change: Change, *, announces: bool, options: dict[str, Any] | None) -> Left:
    model, optimizer = make()
    late = {"adversary": {"max_delay_ms": 5.0}}  # updates run on under what the loop does next
    scope: Any = contextlib.nullcontext()
    with scope if options is None else attach(model, optimizer, device="cpu", k=2, **late, **options) as pipe:
        losses = []
        for number in range(NUM_STEPS):
            if number == AT:
                change(model, optimizer)
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
            with scope if pipe is None or not announces else pipe.updating(optimizer):
                loss = model(x).pow(2).mean()
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return left(model, optimizer, losses)


@pytest.mark.parametrize("announces", [False, True], ids=["plain", "announced"])
@pytest.mark.parametrize("options", OPTIONS, ids=["host", "disk", "states on disk", "on the device"])
@pytest.mark.parametrize("change", [new_states, no_states, one_without, another_parameter])
def test_change_between_steps_leaves_what_it_leaves_in_the_plain_loop(
    change: Change, options: dict[str, Any], announces: bool
) -> None:
    expected = train(change, announces=False, options=None)
    assert train(change, announces=announces, options=options).equals(expected)
