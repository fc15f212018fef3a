"""`strategy.report()` and `strategy.units`: before, during and after a run, and equal to the formulas."""

from __future__ import annotations

import itertools
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.engine.homes import RING_SIZE
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe import Report, StepCounters
from lightning_superpipe.observe.host_bytes import HostBytes
from lightning_superpipe.planning import loads_forward, loads_training, loads_unchanged
from tests.parity.harness import trainer
from tests.parity.probe import Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

DEVICES = ["cpu", pytest.param("emu", marks=pytest.mark.emu)]
WIDTH = 8
UNIT_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
SLOT_BYTES = 512  # aligned


class Static(L.LightningModule):
    """Blocks of one size in a fixed order, no hooks of its own: nothing can write weights between its steps."""

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(num_units)))
        self.training: bool
        self.last_steps: list[StepCounters] = []
        self.totals: list[tuple[str, StepCounters]] = []

    def look(self, stage: str) -> None:
        """Note the report as a step begins."""
        report = cast(SuperpipeStrategy, self.trainer.strategy).report()
        self.last_steps.append(report.last_step)
        self.totals.append((stage, report.total))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.look("train")
        loss: Tensor = self.blocks(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.look("validate")
        self.log("val_loss", self.blocks(batch).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.blocks(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), foreach=False)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def batches(number: int) -> Any:
    return DataLoader(cast(Any, torch.ones(2 * number, WIDTH)), batch_size=2)


def fitted(device: Device, num_units: int, k: int, k_prime: int = 1, **options: Any) -> tuple[Static, Report]:
    """Train two epochs of six batches, each with three of validation, under harmless callbacks."""
    module, strategy = Static(num_units), SuperpipeStrategy(k=k, k_prime=k_prime)
    callbacks = [EarlyStopping("loss", patience=9), Timer()]
    run = trainer(device, strategy, max_epochs=2, num_sanity_val_steps=0, callbacks=callbacks, **options)
    run.fit(module, batches(6), batches(3))
    return module, strategy.report()


SHAPES = [(6, 1), (6, 2), (6, 3), (6, 5), (6, 6), (3, 9)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_loads_of_a_training_step_equal_the_formula(n: int, k: int, device: Device) -> None:
    module, report = fitted(device, n, k, limit_val_batches=0)
    loads = [step.num_loads for step in module.last_steps[1:]] + [report.last_step.num_loads]
    assert loads == [loads_training(n, k)] * 12
    assert report.num_loads == sum(loads)
    assert report.num_plan_misses == 0, "the order of registration is the order of execution"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_loads_of_accumulating_steps_equal_the_formula(n: int, k: int, device: Device) -> None:
    module, report = fitted(device, n, k, limit_val_batches=0, accumulate_grad_batches=2)
    loads = [step.num_loads for step in module.last_steps[1:]] + [report.last_step.num_loads]
    assert loads == [loads_training(n, k), loads_unchanged(n, k)] * 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_loads_of_validation_passes_equal_the_formula(n: int, k: int, device: Device) -> None:
    module, _ = fitted(device, n, k)
    pairs = zip(module.totals, module.totals[1:], strict=False)
    passes = [
        (after - before).num_loads
        for (stage, before), (next_stage, after) in pairs
        if stage == next_stage == "validate"
    ]
    assert passes == [loads_forward(n, k)] * 4
    assert module.totals[-1][1].num_plan_misses == 0


class Backwards(Static):
    """Runs its blocks in another order than that of registration."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.look("train")
        for block in reversed(list(self.blocks)):
            batch = block(batch)
        return batch.pow(2).mean()


@pytest.mark.parametrize("device", DEVICES)
def test_plan_misses_are_zero_after_the_first_step_of_each_mode(device: Device) -> None:
    module, strategy = Backwards(6), SuperpipeStrategy(k=2)
    trainer(device, strategy, max_epochs=2, num_sanity_val_steps=0).fit(module, batches(4))
    steps = [*module.last_steps[1:], strategy.report().last_step]
    assert [step.num_plan_misses for step in steps[1:]] == [0] * 7
    assert [step.num_loads for step in steps[1:]] == [loads_training(6, 2)] * 7
    assert steps[0].num_loads > loads_training(6, 2), "the first step cannot know the order"


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_and_sizes_are_those_of_the_module(device: Device) -> None:
    module, report = fitted(device, 6, 2, limit_val_batches=0)
    weights = 6 * UNIT_BYTES
    assert (report.k, report.k_prime, report.num_units, report.num_steps) == (2, 1, 6, 12)
    assert report.device == ("cpu" if device == "cpu" else "emu:0")
    assert report.peak.slots == 2 * SLOT_BYTES and report.peak.anchors == 0
    assert 0 < report.peak.gradients <= 2 * SLOT_BYTES and report.peak.activations > 0
    assert report.peak_device_bytes == sum(report.peak)
    num_steps_bytes = 12 * 4  # AdamW keeps a step counter per parameter
    assert report.resident_bytes == weights + weights + 2 * weights + num_steps_bytes
    gradients = report.host.gradients
    if device == "cpu":
        assert gradients == weights
    else:  # lent to some units at a time, where memory is not shared; how many is a matter of time
        assert gradients % SLOT_BYTES == 0 and 0 < gradients <= RING_SIZE * SLOT_BYTES
    assert report.host == HostBytes(6 * SLOT_BYTES, 0, gradients, 2 * weights + num_steps_bytes)
    assert report.num_parameters == weights // 4
    assert report.h2d_bytes == report.num_loads * SLOT_BYTES
    assert report.d2h_bytes == 12 * weights and report.last_step.d2h_bytes == weights
    assert report.stall_seconds >= 0 and report.unit_overhead_us > 0
    del module


def test_nothing_can_be_asked_before_a_run() -> None:
    strategy = SuperpipeStrategy()
    for ask in (strategy.report, lambda: strategy.units, lambda: strategy.recording):
        with pytest.raises(SuperpipeError, match=r"call trainer\.fit, validate, test or predict first"):
            ask()
    trainer("cpu", strategy)
    with pytest.raises(SuperpipeError, match="nothing has run yet"):
        strategy.report()


class Asks(Static):
    """Asks in every hook."""

    def ask(self, *_: Any) -> None:
        strategy = cast(SuperpipeStrategy, self.trainer.strategy)
        assert strategy.report().num_units == len(self.blocks)
        assert [row.name for row in strategy.units if row.role == "unit"] == [f"blocks.{i}" for i in range(4)]
        self.num_asked = getattr(self, "num_asked", 0) + 1

    on_fit_start = on_train_start = on_train_batch_start = on_after_backward = on_before_optimizer_step = ask  # type: ignore[assignment]
    on_train_batch_end = on_validation_start = on_validation_batch_end = on_train_end = on_fit_end = ask  # type: ignore[assignment]


@pytest.mark.parametrize("device", DEVICES)
def test_report_and_units_answer_during_and_after_every_stage(device: Device) -> None:
    module, strategy = Asks(4), SuperpipeStrategy(k=2)
    run = trainer(device, strategy, max_epochs=1)
    run.fit(module, batches(2), batches(2))
    assert module.num_asked > 12
    assert strategy.report().num_steps == 2 and "4 units" in str(strategy.units)
    for stage in ("validate", "test"):
        getattr(run, stage)(module, batches(3), verbose=False)
        report = strategy.report()
        assert report.num_steps == 0 and 3 * 4 - 4 <= report.num_loads <= 3 * 4 + 2
        assert report.d2h_bytes == 0 and report.peak.gradients == 0
        assert report.resident_bytes == 4 * UNIT_BYTES
        assert "superpipe on" in str(report)
    first = str(strategy.units)
    run.fit_loop.max_epochs = 2
    run.fit(module, batches(2), batches(2))
    assert str(strategy.units).splitlines()[:6] == first.splitlines()[:6]


def test_the_report_outlives_module_and_trainer() -> None:
    strategy = SuperpipeStrategy(k=2)
    trainer("cpu", strategy, max_epochs=1).fit(ProbeModule())
    held = [value for value in vars(strategy._last_session).values() if isinstance(value, nn.Module)]
    assert held == [], "a report must not keep a model alive"
    assert strategy.report() == strategy.report()


class Logs(Static):
    """Logs the report as metrics."""

    def on_train_epoch_end(self) -> None:
        metrics = cast(SuperpipeStrategy, self.trainer.strategy).report().as_metrics()
        self.log_dict(metrics)


def test_a_module_logs_the_report_as_metrics(tmp_path: Any) -> None:
    module, strategy = Logs(4), SuperpipeStrategy(k=2)
    run = trainer("cpu", strategy, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(module, batches(3))
    names = {name.removeprefix("superpipe/") for name in run.logged_metrics if name.startswith("superpipe/")}
    assert {"k", "k_prime", "num_units", "num_steps", "peak_device_bytes", "resident_bytes", "host_bytes"} <= names
    assert {"num_loads", "num_plan_misses", "h2d_bytes", "d2h_bytes", "stall_seconds", "last_step_num_loads"} <= names
    assert {"peak_slots_bytes", "peak_anchors_bytes", "peak_gradients_bytes", "peak_activations_bytes"} <= names
    assert run.logged_metrics["superpipe/num_units"] == 4
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "superpipe/num_loads" in rows[0]


def test_a_step_is_recorded_when_asked() -> None:
    module, strategy = Static(4), SuperpipeStrategy(k=2, record_step=2)
    trainer("cpu", strategy, max_epochs=1).fit(module, batches(4))
    recording = strategy.recording
    assert recording is not None
    assert recording.unit_names == tuple(f"blocks.{i}" for i in range(4)) and recording.k == 2
    spans = {name: [span for span in recording.spans if span.name == name] for name in "FB"}
    assert {name: [span.unit for span in of] for name, of in spans.items()} == {"F": [0, 1, 2, 3], "B": [3, 2, 1, 0]}
    work = [*spans["F"], *spans["B"]]
    assert all(first.end_s <= second.start_s for first, second in itertools.pairwise(work))


def test_nothing_is_recorded_unless_asked() -> None:
    unrecorded = SuperpipeStrategy(k=2)
    trainer("cpu", unrecorded, max_epochs=1).fit(Static(4), batches(1))
    assert unrecorded.recording is None
