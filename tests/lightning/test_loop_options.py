"""The Trainer's options that change how often and how long things run, and the tuner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder, Timer
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from tests.lightning.stories import Bench, Story, assert_same, devices, metrics_of
from tests.parity.probe import WIDTH, Device, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run_2": {"fast_dev_run": 2},
    "overfit_batches": {"overfit_batches": 1},
    "overfit_share": {"overfit_batches": 0.5},
    "limit_batches": {"limit_train_batches": 3, "limit_val_batches": 1},
    "no_validation": {"limit_val_batches": 0},
    "max_steps": {"max_steps": 5, "max_epochs": -1},
    "max_steps_between_micro_batches": {"max_steps": 1, "accumulate_grad_batches": 3},
    "validate_within_the_epoch": {"val_check_interval": 2},
    "validate_by_share": {"val_check_interval": 0.25},
    "validate_across_epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "validate_every_other_epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "accumulate": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "reload_data": {"reload_dataloaders_every_n_epochs": 1},
    "deterministic": {"deterministic": True},
    "no_sanity_check": {"num_sanity_val_steps": 0},
    "all_sanity_checks": {"num_sanity_val_steps": -1},
    "profiled": {"profiler": "simple"},
    "barebones": {"barebones": True},
}


def with_options(name: str) -> Story:
    def story(bench: Bench) -> ProbeModule:
        module = ProbeModule()
        options = dict(OPTIONS[name])
        if "barebones" in options:  # it forbids what the bench says to keep quiet
            options |= {"enable_checkpointing": None, "logger": None, "num_sanity_val_steps": None}
            options |= {"enable_progress_bar": None, "enable_model_summary": None}
        bench.trainer(**options).fit(module)
        return module

    story.__name__ = name
    return story


@pytest.mark.parametrize(("story", "device"), devices(map(with_options, OPTIONS), emu=False))
def test_fit_with_options_equals_the_ordinary_one(story: Story, device: Device) -> None:
    assert_same(story, device)


@pytest.mark.parametrize(
    ("story", "device"),
    devices(map(with_options, ["fast_dev_run", "overfit_batches", "validate_within_the_epoch"]))[1::2],
)
def test_fit_with_options_equals_the_ordinary_one_on_another_device(story: Story, device: Device) -> None:
    assert_same(story, device)


@pytest.mark.parametrize("schedule", [{0: 1, 1: 2, 2: 3}, {0: 4, 1: 1}], ids=str)
def test_accumulation_schedules_equal_the_ordinary_run(schedule: dict[int, int]) -> None:
    def story(bench: Bench) -> ProbeModule:
        module = ProbeModule()
        callback = GradientAccumulationScheduler(schedule)
        bench.trainer(callbacks=[callback], max_epochs=4, gradient_clip_val=0.1).fit(module)
        return module

    assert_same(story, "cpu")


class Tunable(ProbeModule):
    """Has a learning rate and a batch size to find."""

    def build(self) -> None:
        self.lr = 1e-3
        self.batch_size = 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, foreach=False)

    def train_dataloader(self) -> Any:
        rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
        return DataLoader(cast(Any, rows), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def finds_rate(bench: Bench) -> Tunable:
    module = Tunable()
    run = bench.trainer(max_epochs=1, limit_train_batches=4)
    finder = Tuner(run).lr_find(module, num_training=12, update_attr=True, min_lr=1e-4, max_lr=1e-1)
    assert finder is not None
    module.record("losses", torch.tensor(finder.results["loss"]))
    module.record("rates", torch.tensor(finder.results["lr"]))
    module.record("rate", module.lr)
    run.fit(module)
    return module


def finds_batch_size(bench: Bench) -> Tunable:
    module = Tunable()
    run = bench.trainer(max_epochs=1, limit_train_batches=4)
    size = Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=2)
    assert size is not None
    module.record("size", size)
    run.fit(module)
    return module


def finds_batch_size_for_validation(bench: Bench) -> Tunable:
    module = Tunable()
    run = bench.trainer(max_epochs=1, limit_train_batches=4)
    Tuner(run).scale_batch_size(module, method="validate", max_trials=1, steps_per_trial=1)
    run.fit(module)
    return module


def finds_by_callbacks(bench: Bench) -> Tunable:
    module = Tunable()
    callbacks = [BatchSizeFinder(max_trials=1, steps_per_trial=1), LearningRateFinder(num_training_steps=8)]
    run = bench.trainer(max_epochs=1, limit_train_batches=4, callbacks=callbacks, enable_checkpointing=True)
    run.fit(module)
    module.record("found", torch.tensor([module.lr, module.batch_size]))
    return module


def stops_by_the_clock(bench: Bench) -> Tunable:
    module = Tunable()
    run = bench.trainer(max_epochs=1, limit_train_batches=4, callbacks=[Timer(duration={"minutes": 5})])
    run.fit(module)
    return module


TUNED: list[Callable[[Bench], Any]] = [
    finds_rate,
    finds_batch_size,
    finds_batch_size_for_validation,
    finds_by_callbacks,
    stops_by_the_clock,
]


@pytest.mark.parametrize(("story", "device"), devices(TUNED, emu=False))
def test_tuned_runs_equal_the_ordinary_ones(
    story: Story, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the finders save the module beside the program
    assert_same(story, device)
    assert list(tmp_path.glob("*.ckpt")) == []


@pytest.mark.emu
def test_finding_a_rate_equals_the_ordinary_run_on_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_same(finds_rate, "emu")


class Several(ProbeModule):
    """Has two loaders for everything."""

    def train_dataloader(self) -> Any:
        return {"a": fixed_batches(3), "b": fixed_batches(2)}

    def val_dataloader(self) -> Any:
        return [fixed_batches(2), fixed_batches(1)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch["a"] + batch["b"], batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


def several_loaders(bench: Bench) -> Several:
    module = Several()
    run = bench.trainer(max_epochs=2)
    run.fit(module)
    metrics_of(module, run)
    return module


class Skips(ProbeModule):
    """Skips some steps, and ends an epoch early."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def skipped_steps(bench: Bench) -> Skips:
    module = Skips()
    bench.trainer(max_epochs=2).fit(module)
    return module


@pytest.mark.parametrize(("story", "device"), devices([several_loaders, skipped_steps]))
def test_unusual_loaders_and_steps_equal_the_ordinary_run(story: Story, device: Device) -> None:
    assert_same(story, device)
