"""A device that runs out of memory in a training step: the step is repeated under a smaller plan, or refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import BudgetError
from lightning_superpipe.planning.budget import AUTO_K
from tests.emu import capacity, peak_bytes, reset_peak, used_bytes
from tests.engine.tiny import Block
from tests.parity.harness import trainer

pytestmark = [pytest.mark.emu, pytest.mark.filterwarnings("ignore")]

WIDTH, BATCH, NUM_BLOCKS, NUM_STEPS = 32, 64, 6, 5


class Network(L.LightningModule):
    """Blocks with dropout, then batch norm; draws from every generator, and logs means over the epoch."""

    def __init__(self, fails_in: str = "", when: int = -1, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, dropout=0.2) for _ in range(NUM_BLOCKS))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.fails_in, self.when, self.optimizer_name = fails_in, when, optimizer
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.fails_in == "late" and self.when == self.global_step and x.requires_grad:
            x.register_hook(self.fail)  # type: ignore[no-untyped-call]
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.log("seen", float(index), on_step=False, on_epoch=True)
        loss = self(batch[0]).pow(2).mean() * (1 + random.random() + float(np.random.rand()))
        if self.when == self.global_step and self.fails_in:
            if self.fails_in == "forward":
                self.fail()
            if self.fails_in == "backward":
                loss.register_hook(self.fail)
        self.log("loss", loss, on_epoch=True)
        self.losses.append(loss.item())
        return loss  # type: ignore[no-any-return]

    def fail(self, *_: object) -> None:
        """Once."""
        self.when = -1
        raise torch.OutOfMemoryError("the device has 0 bytes left.")

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), lr=1e-2)


class Result(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    report: Any = None


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(NUM_STEPS * BATCH, WIDTH, generator=generator)), batch_size=BATCH)


def run(strategy: SuperpipeStrategy | None, *, device: Any = "emu", batches: Any = None, **options: Any) -> Result:
    L.seed_everything(3, verbose=False)
    random.seed(3)
    module = Network(**{name: options.pop(name) for name in ("fails_in", "when", "optimizer") if name in options})
    runner = trainer(device, strategy, **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    runner.fit(module, batches or data())
    losses = module.losses
    if strategy is not None and len(losses) > 2 * NUM_STEPS:  # a failed attempt in backward has noted its loss
        losses = [loss for loss, after in zip(losses, [*losses[1:], None], strict=True) if loss != after]
    weights = {name: value.cpu().clone() for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    return Result(losses, weights, metrics, strategy.report() if strategy else None)


def assert_equal(found: Result, expected: Result) -> None:
    assert found.losses == expected.losses
    assert found.metrics == expected.metrics
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), name


@pytest.fixture(scope="module")
def expected(emu: torch.device) -> Iterator[Result]:
    yield run(None)


@pytest.mark.parametrize("fails_in", ["forward", "backward", "late"])
@pytest.mark.parametrize("when", [0, 1, 5, 6])
@pytest.mark.parametrize("update", ["after_backward", "at_once", "auto"])
def test_a_step_that_failed_is_repeated_as_if_it_had_not_been(
    expected: Result, fails_in: str, when: int, update: str
) -> None:
    strategy = SuperpipeStrategy(update=update, adversary=Adversary(max_delay_ms=1.0))  # type: ignore[arg-type]
    if (fails_in, update, when) == ("late", "auto", 1):
        with pytest.raises(BudgetError, match=r"units had been updated by then .*go on from the last checkpoint"):
            run(strategy, fails_in=fails_in, when=when)
        return
    found = run(strategy, fails_in=fails_in, when=when)
    assert_equal(found, expected)
    assert found.report.num_steps == 2 * NUM_STEPS
    assert when == 5 or found.report.k < AUTO_K  # the plan that step 5 begins with may have another k


def peak_of(**options: Any) -> int:
    base = used_bytes()
    reset_peak()
    run(SuperpipeStrategy(**options))
    return peak_bytes() - base


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_device_that_is_too_small_for_the_first_plan_is_enough_for_another(expected: Result, share: float) -> None:
    small, large = peak_of(k=1, activations="recompute"), peak_of(k=3)
    with capacity(used_bytes() + small + int(share * (large - small))):
        with pytest.raises(BudgetError, match="no room for a training step with k=3"):
            run(SuperpipeStrategy(k=3, activations="keep"))
        found = run(SuperpipeStrategy())
    assert_equal(found, expected)
    assert found.report.peak_device_bytes > small


def test_a_batch_larger_than_any_before_is_met_by_a_smaller_plan(emu: torch.device) -> None:
    rows = torch.randn(2 * NUM_STEPS + 7, BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    sizes = [1] * (2 * NUM_STEPS - 1) + [8]
    batches = DataLoader([[each.flatten(0, 1)] for each in rows.split(sizes)], batch_size=None)
    base = used_bytes()
    reset_peak()
    run(SuperpipeStrategy(k=1, activations="recompute"), batches=batches, max_epochs=1)
    least = peak_bytes() - base
    with capacity(used_bytes() + int(1.1 * least)):
        with pytest.raises(BudgetError, match="no room for a training step"):
            run(SuperpipeStrategy(k=1, activations="keep"), batches=batches, max_epochs=1)
        found = run(SuperpipeStrategy(), batches=batches, max_epochs=1)
    assert "recompute" not in found.report.plan  # what was chosen for the batches that were seen
    assert_equal(found, run(None, batches=batches, max_epochs=1))


def test_without_a_smaller_plan_the_step_is_refused_with_all_knobs_and_the_way_out() -> None:
    with pytest.raises(BudgetError) as caught:
        run(SuperpipeStrategy(k=2, activations="offload"), fails_in="backward", when=2)
    text = str(caught.value)
    for part in ("k=2, 0 resident, activations offload", "0 bytes left", "smaller batch", "'auto'", "last finished"):
        assert part in text, part


def test_after_a_refusal_the_model_is_that_of_the_last_finished_step() -> None:
    full = run(None, max_steps=2)
    L.seed_everything(3, verbose=False)
    random.seed(3)
    module = Network(fails_in="late", when=2)
    with pytest.raises(BudgetError):
        trainer("emu", SuperpipeStrategy(k=1, activations="keep", update="after_backward"), max_epochs=2).fit(
            module, data()
        )
    for name, value in module.state_dict().items():
        assert torch.equal(value, full.weights[name]), name
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(type(inner).__module__ != "abc" and not hasattr(inner, "_superpipe_owner") for inner in module.modules())


class Accumulating(Network):
    """Fails in its batch of that number."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.when = self.global_step if index == 3 else -1
        return super().training_step(batch, index)


@pytest.mark.parametrize(("every", "message"), [(2, "Gradients of earlier batches had been there"), (3, "Only whole")])
def test_gradients_of_earlier_batches_are_not_added_to_twice(every: int, message: str) -> None:
    """With two batches to a step the fourth is the last of its step, with three it is the first of the next."""
    full = run(None, accumulate_grad_batches=every, max_steps=1)
    L.seed_everything(3, verbose=False)
    random.seed(3)
    module = Accumulating(fails_in="late")
    strategy = SuperpipeStrategy(update="after_backward")
    runner = trainer("emu", strategy, max_epochs=1, accumulate_grad_batches=every)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        runner.fit(module, data())
    assert message in " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for name, value in module.state_dict().items():
        assert torch.equal(value, full.weights[name]), name
    assert all(parameter.grad is None for parameter in module.parameters())
