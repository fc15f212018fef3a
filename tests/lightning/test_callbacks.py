"""Lightning's own callbacks: what they write, read, save and stop equals the ordinary run."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from rich import reconfigure
from torch import Tensor, nn

from lightning_superpipe.errors import SuperpipeWarning
from tests.lightning.stories import WINDOW, Bench, Originals, Story, Watched, assert_same, devices, metrics_of
from tests.parity.probe import Device

pytestmark = pytest.mark.filterwarnings("ignore")


class Values(Logger):
    """Keeps what is logged."""

    name, version = "values", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged += [(name, float(value)) for name, value in sorted(metrics.items())]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def ema(bench: Bench) -> list[Callback]:
    return [EMAWeightAveraging(decay=0.9, update_every_n_steps=2)]


def average(bench: Bench) -> list[Callback]:
    return [WeightAveraging()]


def average_on_the_host(bench: Bench) -> list[Callback]:
    return [WeightAveraging(device="cpu", use_buffers=False)]


def swa(bench: Bench) -> list[Callback]:
    return [StochasticWeightAveraging(1e-2, swa_epoch_start=1)]


def rates(bench: Bench) -> list[Callback]:
    return [LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)]


def stopping(bench: Bench) -> list[Callback]:
    return [EarlyStopping("val_loss", patience=1, check_finite=True)]


def summaries(bench: Bench) -> list[Callback]:
    return [ModelSummary(max_depth=-1), RichModelSummary(max_depth=3)]


def bars(bench: Bench) -> list[Callback]:
    return [RichProgressBar(leave=True)]


def tqdm(bench: Bench) -> list[Callback]:
    return [TQDMProgressBar()]


def throughput(bench: Bench) -> list[Callback]:
    return [ThroughputMonitor(batch_size_fn=len)]


def stories(bench_callbacks: Callable[[Bench], list[Callback]]) -> Story:
    def story(bench: Bench) -> Watched:
        module, logger = Watched(), Values()
        callbacks = bench_callbacks(bench)
        shows = any("Progress" in type(each).__name__ for each in callbacks)
        options: dict[str, Any] = {"enable_progress_bar": shows, "enable_model_summary": bench_callbacks is summaries}
        run = bench.trainer(
            callbacks=callbacks, logger=logger, log_every_n_steps=1, max_epochs=3, accumulate_grad_batches=2, **options
        )
        originals = Originals(module)
        run.fit(module)
        originals.assert_kept() if bench.window else None
        run.validate(module, verbose=False)
        metrics_of(module, run)
        for name, value in logger.logged:
            if "time" not in name and "_per_sec" not in name:
                module.record(name, value)
        module.record("epochs", run.current_epoch)
        return module

    story.__name__ = bench_callbacks.__name__
    return story


HARMLESS = [ema, average, average_on_the_host, swa, rates, stopping, summaries, bars, tqdm, throughput]


@pytest.fixture(autouse=True)
def _screen() -> Iterator[None]:
    reconfigure(file=io.StringIO())
    yield
    reconfigure(file=None)


@pytest.mark.parametrize(("story", "device"), devices(map(stories, HARMLESS)))
def test_run_with_a_callback_equals_the_ordinary_one(story: Story, device: Device) -> None:
    assert_same(story, device)


@pytest.mark.emu
@pytest.mark.parametrize("kind", [EMAWeightAveraging, StochasticWeightAveraging])
@pytest.mark.filterwarnings("default::lightning_superpipe.errors.SuperpipeWarning")
def test_a_callback_that_keeps_the_model_on_the_device_is_pointed_out(kind: Any) -> None:
    callback = kind() if kind is EMAWeightAveraging else kind(1e-2, device=None)
    said = f"{kind.__name__} keeps a full copy of the model on emu:0.*device='cpu'"
    with pytest.warns(SuperpipeWarning, match=said):
        Bench("emu", WINDOW).trainer(callbacks=[callback], fast_dev_run=True).fit(Watched())


def written_between_forward_and_backward(bench: Bench) -> Watched:
    """Through `.data`, by which no counter changes: the units of the turn are on the device and stale."""
    module = Watched()

    def write(*_: Any) -> None:
        for parameter in module.parameters():
            parameter.data.mul_(0.9)

    bench.trainer(callbacks=[LambdaCallback(on_before_zero_grad=write)], max_epochs=1).fit(module)
    return module


def written_between_steps(bench: Bench) -> Watched:
    module = Watched()

    def write(*_: Any) -> None:
        for parameter in module.parameters():
            parameter.data.clamp_(-0.1, 0.1)

    callback = LambdaCallback(on_train_batch_end=write, on_validation_batch_end=write)
    bench.trainer(callbacks=[callback], max_epochs=2, accumulate_grad_batches=2).fit(module)
    return module


WRITERS = [written_between_forward_and_backward, written_between_steps]


@pytest.mark.parametrize(("story", "device"), devices(WRITERS))
def test_weights_written_by_a_callback_are_seen(story: Story, device: Device) -> None:
    assert_same(story, device)


class Backbone(Watched):
    """Freezes its blocks with their batch norm, thaws them later as a new group."""

    def build(self) -> None:
        self.norm = nn.BatchNorm1d(self.embed.out_features)
        self.backbone = nn.Sequential(nn.BatchNorm1d(self.embed.in_features), *self.blocks)
        self.blocks = nn.ModuleList()

    def trunk(self, x: Tensor) -> Tensor:
        return self.norm(self.backbone(self.embed(x)))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


def finetuned(bench: Bench) -> Backbone:
    module = Backbone()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, backbone_initial_lr=1e-3)
    run = bench.trainer(callbacks=[callback], max_epochs=3)
    run.fit(module)
    module.record("groups", len(run.optimizers[0].param_groups))
    return module


@pytest.mark.parametrize(("story", "device"), devices([finetuned]))
def test_backbone_finetuning_equals_the_ordinary_run(story: Story, device: Device) -> None:
    assert_same(story, device)


class Statistics(Callback):
    """Notes the size of the model that the summary shows."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        summary = summarize(pl_module, max_depth=3)
        self.sizes = (summary.total_parameters, summary.trainable_parameters, summary.model_size)
        self.text = str(summary)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_the_summary_shows_the_model_in_full_size(device: Device) -> None:
    found = []
    for window in (None, WINDOW):
        statistics = Statistics()
        module = Watched()
        module.example_input_array = torch.ones(2, module.embed.in_features)
        Bench(device, window).trainer(callbacks=[statistics], fast_dev_run=True).fit(module)
        found.append((statistics.sizes, statistics.text))
    assert found[0] == found[1]
    assert found[0][0][0] == sum(parameter.numel() for parameter in Watched().parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_device_statistics_and_a_file_logger_work(device: Device, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    logger = CSVLogger(tmp_path)
    run = Bench(device, WINDOW).trainer(
        callbacks=[DeviceStatsMonitor(cpu_stats=False)], logger=logger, log_every_n_steps=1, max_epochs=1
    )
    run.fit(Watched())
    assert logger.experiment.metrics or (Path(logger.log_dir) / "metrics.csv").exists()
