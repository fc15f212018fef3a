"""Lightning's Trainer with files: it announces its steps, so units are updated in backward, to the ordinary bits."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy, open_kept
from lightning_superpipe.errors import TransferError, UnsupportedError
from lightning_superpipe.observe.trace import Lane, Recording
from tests.disk.loops import WIDTH, Left, Model, left

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_STEPS = 5


class Module(L.LightningModule):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.fused = Model(), fused
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


def fit(strategy: Any, *, fused: bool, **options: Any) -> Left:
    batches = list(torch.randn(NUM_STEPS, 4, WIDTH, generator=torch.Generator().manual_seed(0)))
    module = Module(fused)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", strategy=strategy, **quiet, **options)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return left(module.model, trainer.optimizers[0], module.losses)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("store", ["disk", {"weights": "disk"}, {"states": "disk"}])
def test_trainer_updates_units_from_files_in_backward_to_the_same_bits(store: Any, fused: bool) -> None:
    strategy = SuperpipeStrategy(k=2, store=store, record_step=3)
    assert fit(strategy, fused=fused).equals(fit("auto", fused=fused))
    recording = strategy.recording
    assert isinstance(recording, Recording)
    backward = max(span.end_s for span in recording.lane(Lane.COMPUTE) if span.name == "B")
    first = min(span.start_s for span in recording.lane(Lane.HOST) if span.name == "U")
    assert first < backward, "no unit was updated before backward was over"


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}])
def test_trainer_that_looks_at_gradients_or_adds_to_them_has_the_same_bits(options: dict[str, Any]) -> None:
    strategy = SuperpipeStrategy(k=2, store="disk")
    assert fit(strategy, fused=False, **options).equals(fit("auto", fused=False, **options))


class LastWriteFails(L.Callback):
    """The last step writes when all are over, and then it cannot: nobody but the end of the run waits for that."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.is_over = patch, threading.Event()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == NUM_STEPS - 1:
            left(module.model, trainer.optimizers[0])  # nothing is under way
            self.patch.setattr(os, "pwritev", self.fail)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.is_over.set()

    def fail(self, *_: Any) -> int:
        assert self.is_over.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_failure_that_only_the_end_of_the_run_meets_is_told_there_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SuperpipeStrategy(k=2, store="disk")
    with pytest.raises(TransferError, match=r"unit 'model\.blocks\.\d' failed.*has been undone"):
        fit(strategy, fused=False, callbacks=[LastWriteFails(monkeypatch)])
    assert strategy.report().num_steps == NUM_STEPS


class WithTest(Module):
    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(batch).pow(2).mean())


def test_what_is_kept_is_kept_by_training_whatever_is_tested_before_and_after(tmp_path: Path) -> None:
    options = {"folder": str(tmp_path / "store"), "keep": True}
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        strategy=SuperpipeStrategy(k=2, store="disk", disk=options),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module, batches = WithTest(fused=False), list(torch.ones(NUM_STEPS, 4, WIDTH))
    for run in (trainer.test, trainer.fit, trainer.test):
        run(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type, operator]
    weights = open_kept(tmp_path / "store").weights
    assert all(map(torch.equal, weights.values(), module.parameters()))
    with pytest.raises(UnsupportedError, match="has kept"):
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
