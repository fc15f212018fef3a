"""Fit, validate, test and predict in any order, again and again, with one Trainer or one strategy object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from tests.lightning.stories import Bench, Originals, Story, assert_same, devices, metrics_of
from tests.parity.harness import ALL_UNITS, Window
from tests.parity.probe import Device, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


class Staged(ProbeModule):
    """Does something in every stage."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.record("sanity" if self.trainer.sanity_checking else "validation", self(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record("test", self(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        y: Tensor = self(batch)
        return y

    def test_dataloader(self) -> Any:
        return fixed_batches(2)

    def predict_dataloader(self) -> Any:
        return fixed_batches(2)


def go(run: L.Trainer, module: Staged, stages: str) -> None:
    """Run stages named by their first letters: f, v, t, p."""
    for stage in stages:
        if stage == "f":
            run.fit_loop.max_epochs = run.current_epoch + 1
            run.fit(module)
        elif stage == "p":
            predictions = run.predict(module)
            assert predictions is not None
            module.record("predictions", torch.cat([each.cpu() for each in predictions]))  # type: ignore[union-attr]
        else:
            getattr(run, {"v": "validate", "t": "test"}[stage])(module, verbose=False)
        metrics_of(module, run)


def one_trainer(stages: str) -> Story:
    def story(bench: Bench) -> Staged:
        module = Staged()
        originals = Originals(module)
        go(bench.trainer(max_epochs=1), module, stages)
        originals.assert_kept()
        return module

    story.__name__ = stages
    return story


ORDERS = ["fvtp", "ptvf", "vfvf", "ff", "tfptf", "pp"]


@pytest.mark.parametrize(("story", "device"), devices(map(one_trainer, ORDERS)))
def test_stages_in_any_order_equal_the_ordinary_run(story: Story, device: Device) -> None:
    assert_same(story, device)


@pytest.mark.parametrize("window", [Window(1, 1), Window(3, 2), Window(ALL_UNITS, 1)], ids=str)
def test_stages_equal_the_ordinary_run_in_every_window(window: Window) -> None:
    assert_same(one_trainer("vftpf"), "cpu", window)


def one_strategy_two_trainers(bench: Bench) -> Staged:
    strategy, module = bench.strategy(), Staged()
    originals = Originals(module)
    for stages in ("vf", "fpt"):
        go(bench.trainer(strategy, max_epochs=1), module, stages)
    originals.assert_kept()
    return module


def one_strategy_two_modules(bench: Bench) -> Staged:
    strategy, first, second = bench.strategy(), Staged(), Staged()
    for module in (first, second, first, second):
        go(bench.trainer(strategy, max_epochs=1), module, "fv")
    second.losses += first.losses
    second.extra += [(name, value) for name, value in first.state_dict().items()]
    return second


def sanity_check_then_fit(bench: Bench) -> Staged:
    module = Staged()
    bench.trainer(max_epochs=2, num_sanity_val_steps=2).fit(module)
    return module


def without_inference_mode(bench: Bench) -> Staged:
    module = Staged()
    go(bench.trainer(max_epochs=1, inference_mode=False), module, "vfpt")
    return module


class Differs(Staged):
    """Evaluates with gradients of its input, inside `torch.enable_grad`."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        with torch.enable_grad():
            x = batch.clone().requires_grad_()
            cast(Any, self.loss(x)).backward()
        self.record("input gradient", x.grad if x.grad is not None else torch.zeros(0))
        self.zero_grad()


def gradients_in_validation(bench: Bench) -> Differs:
    module = Differs()
    run = bench.trainer(max_epochs=1, inference_mode=False)
    run.fit(module)
    run.validate(module, verbose=False)
    return module


def forward_between_runs(bench: Bench) -> Staged:
    module = Staged()
    run = bench.trainer(max_epochs=1)
    for stages in ("f", "v", "f"):
        go(run, module, stages)
        module.eval()
        module.record("outside", module(torch.ones(2, module.embed.in_features)))
        module.train()
    return module


def weights_changed_between_runs(bench: Bench) -> Staged:
    module = Staged()
    run = bench.trainer(max_epochs=1)
    for _ in range(2):
        go(run, module, "fv")
        for parameter in module.parameters():
            parameter.data.mul_(0.5)
    go(run, module, "vf")
    return module


class MeanOfAll(Metric):
    """A user's own metric, whose state is no buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(3), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        sums = torch.stack([values.sum(), values.pow(2).sum(), torch.ones_like(values).sum()])
        self.total = self.total + sums

    def compute(self) -> Tensor:
        return self.total[0] / self.total[2]


class Measured(Staged):
    """Updates metrics of its own in every stage."""

    def build(self) -> None:
        self.metric = MeanOfAll()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.metric.update(y.detach())
        return y

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss


def own_metric(bench: Bench) -> Measured:
    module = Measured()
    run = bench.trainer(max_epochs=1)
    go(run, module, "fvft")
    return module


OTHERS: list[Callable[[Bench], Any]] = [
    one_strategy_two_trainers,
    one_strategy_two_modules,
    sanity_check_then_fit,
    without_inference_mode,
    gradients_in_validation,
    forward_between_runs,
    weights_changed_between_runs,
    own_metric,
]


@pytest.mark.parametrize(("story", "device"), devices(OTHERS))
def test_runs_one_after_the_other_equal_the_ordinary_ones(story: Story, device: Device) -> None:
    assert_same(story, device)
