"""Loops of Fabric and Accelerate may promise to touch no gradient: units are then updated beside backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_superpipe import FabricSuperpipeStrategy, SuperpipeAccelerator
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.optimizer import UpdateStage

WIDTH, NUM_UNITS, NUM_STEPS = 8, 4, 4
OPTIONS: list[dict[str, Any]] = [{"adversary": Adversary(max_delay_ms=0.2)}, {"store": "disk"}]
Scope = Callable[[Any], AbstractContextManager[None]]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units whose update began in a backward pass."""
    units: list[int] = []
    start = UpdateStage._start

    def noting(self: Any, unit: Any, part: Any, bench: Any, **options: Any) -> None:
        units.extend([unit.index] if self._announced is not None else [])
        start(self, unit, part, bench, **options)

    monkeypatch.setattr(UpdateStage, "_start", noting)
    return units


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_UNITS)))


def weights_of(front_end: Any, scope: Scope, *, clips: bool = False) -> list[Tensor]:
    model: Any = network()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    is_fabric = isinstance(front_end, Fabric)
    model, optimizer = front_end.setup(model, optimizer) if is_fabric else front_end.prepare(model, optimizer)
    for number in range(NUM_STEPS):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
        with scope(optimizer):
            front_end.backward(model(x).pow(2).mean())
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.parameters()]


def nothing(_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def fabric_of(options: dict[str, Any], **others: Any) -> tuple[Fabric, Scope]:
    strategy = FabricSuperpipeStrategy(k=2, **options)
    return Fabric(accelerator="cpu", devices=1, strategy=strategy, **others), strategy.updating


def accelerator_of(options: dict[str, Any]) -> tuple[SuperpipeAccelerator, Scope]:
    accelerator = SuperpipeAccelerator(cpu=True, superpipe={"k": 2, **options})
    return accelerator, accelerator.updating


@pytest.mark.parametrize("options", OPTIONS, ids=["host", "disk"])
def test_fabric_updates_beside_backward_to_the_same_bits(options: dict[str, Any], early: list[int]) -> None:
    expected = weights_of(Fabric(accelerator="cpu", devices=1), nothing)
    assert all(map(torch.equal, weights_of(*fabric_of(options)), expected))
    assert set(early) == set(range(NUM_UNITS))


@pytest.mark.parametrize("options", OPTIONS, ids=["host", "disk"])
def test_accelerate_updates_beside_backward_to_the_same_bits(options: dict[str, Any], early: list[int]) -> None:
    expected = weights_of(Accelerator(cpu=True), nothing)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(map(torch.equal, weights_of(*accelerator_of(options)), expected))
    assert set(early) == set(range(NUM_UNITS))


def accumulated(accelerator: Any, scope: Scope) -> list[Tensor]:
    model: Any = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for number in range(2 * NUM_STEPS):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
        with accelerator.accumulate(model), scope(optimizer):
            accelerator.backward(model(x).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.parameters()]


def test_batches_that_accumulate_are_announced_with_their_last_one_alone(early: list[int]) -> None:
    expected = accumulated(Accelerator(cpu=True, gradient_accumulation_steps=2), nothing)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = SuperpipeAccelerator(cpu=True, gradient_accumulation_steps=2, superpipe={"k": 2, **OPTIONS[0]})
    assert all(map(torch.equal, accumulated(accelerator, accelerator.updating), expected))
    assert early


@pytest.mark.parametrize("make", [fabric_of, accelerator_of])
def test_clipping_inside_the_promise_is_refused(make: Callable[..., tuple[Any, Scope]]) -> None:
    with pytest.raises(SuperpipeError, match="were changed between backward and step"):
        weights_of(*make(OPTIONS[1]), clips=True)


def test_scaled_gradients_are_not_announced() -> None:
    strategy = FabricSuperpipeStrategy(k=2)
    Fabric(accelerator="cpu", devices=1, strategy=strategy)
    strategy.precision.scaler = object()  # type: ignore[attr-defined]  # as under "16-mixed" on an accelerator
    assert isinstance(strategy.updating(None), nullcontext)
