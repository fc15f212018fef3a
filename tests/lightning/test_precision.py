"""Precision plugins through all stages, with accumulation, clipping and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from tests.lightning.stories import Bench, Originals, Story, assert_same, tensors
from tests.parity.probe import Device, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


def scaled(device: str) -> Precision:
    # Small enough to grow within a few steps, so that the scale changes during the run.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
    return MixedPrecision("16-mixed", device, scaler)


PRECISIONS: dict[str, Callable[[str], Precision]] = {
    "32-true": lambda device: Precision(),
    "64-true": lambda device: DoublePrecision(),
    "16-true": lambda device: HalfPrecision("16-true"),
    "bf16-true": lambda device: HalfPrecision("bf16-true"),
    "bf16-mixed": lambda device: MixedPrecision("bf16-mixed", device),
    "16-mixed": scaled,
}


class Mixed(ProbeModule):
    """Has a batch norm, whose statistics stay in full precision under autocast."""

    def build(self) -> None:
        self.norm = nn.BatchNorm1d(self.embed.out_features)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(self.norm(x))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record("test", self(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        y: Tensor = self(batch)
        self.record("prediction", y)
        return y

    def configure_optimizers(self) -> Any:
        return self.adamw(foreach=False, eps=1e-4)  # half precision cannot hold the default

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        weight = self.block(1).up.weight
        assert weight.grad is not None
        self.record("gradient", weight.grad)

    def test_dataloader(self) -> Any:
        return fixed_batches(2)

    def predict_dataloader(self) -> Any:
        return fixed_batches(2)


def through_all_stages(name: str) -> Story:
    def story(bench: Bench) -> Mixed:
        module = Mixed()
        originals = Originals(module)
        plugin = PRECISIONS[name](bench.device)
        clips: dict[str, Any] = {} if name == "16-true" else {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
        run = bench.trainer(plugins=[plugin], max_epochs=2, **clips)
        run.fit(module)
        for stage in ("validate", "test"):
            getattr(run, stage)(module, verbose=False)
        run.predict(module)
        run.fit_loop.max_epochs = 3
        run.fit(module)
        if bench.window is not None:
            originals.assert_kept()
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None:
            module.record("scale", scaler.get_scale())
        return module

    return story


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("name", PRECISIONS)
def test_all_stages_in_a_precision_equal_the_ordinary_run(name: str, device: Device) -> None:
    assert_same(through_all_stages(name), device)


def resumed(name: str, folder: Path) -> Story:
    """Written streamed and plain, resumed the other way round."""

    def story(bench: Bench) -> Mixed:
        writer = Bench(bench.device, None) if bench.window is not None else bench
        path = folder / f"{bench.window}.ckpt"
        first = writer.trainer(plugins=[PRECISIONS[name](bench.device)], max_epochs=1)
        first.fit(Mixed())
        first.save_checkpoint(path)
        torch.manual_seed(5)
        module = Mixed()
        plugin = PRECISIONS[name](bench.device)
        bench.trainer(plugins=[plugin], max_epochs=2).fit(module, ckpt_path=path, weights_only=False)
        held = torch.load(path, weights_only=False, map_location="cpu")
        module.record("entries", len(tensors(held)))
        return module

    return story


@pytest.mark.parametrize("name", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_resuming_in_a_precision_equals_the_ordinary_run(name: str, tmp_path: Path) -> None:
    assert_same(resumed(name, tmp_path), "cpu")


@pytest.mark.parametrize("name", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision_given_by_name_is_used(name: str) -> None:
    def story(bench: Bench) -> Mixed:
        module = Mixed()
        bench.trainer(precision=name, max_epochs=1).fit(module)
        return module

    assert_same(story, "cpu")
