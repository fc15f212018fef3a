"""One recorded step under Lightning's Trainer: a trace for Perfetto, pictures, and what the lanes did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import loss_of, make_batch, make_model, make_optimizer
from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.observe import Lane, Recording, write_recording

__all__ = ["lanes_of", "trace"]

_RECORDED_STEP = 3  # the first two allocate and learn the order


class _Module(L.LightningModule):
    """The model as a user would have it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net = make_model(job)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.parameters())


def trace(job: Job, device: torch.device, begin: Callable[[], None]) -> dict[str, Any]:
    """Train a few steps, and write the recording of one to ``job.folder``.

    Returns:
        What the lanes did, and the names of the files.
    """
    strategy = SuperpipeStrategy(k=job.k or "auto", k_prime=job.k_prime, record_step=_RECORDED_STEP)
    rows: Any = [make_batch(job)] * (_RECORDED_STEP + 2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator=_accelerator(device),
        devices=1,
        strategy=strategy,
        max_steps=len(rows),
        enable_model_summary=False,
        **quiet,
    )
    module = _Module(job)
    begin()
    trainer.fit(module, DataLoader(rows, batch_size=None))
    recording = strategy.recording
    assert recording is not None, "the step after the recorded one has ended"
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files, note = [path.name for path in write_recording(recording, folder)], ""
    except UnsupportedError as error:
        files, note = ["trace.json", "recording.json"], str(error)
    return {"device": str(device), "note": note, "files": files, **lanes_of(recording)}


def _accelerator(device: torch.device) -> Any:
    if device.type == "emu":
        from tests.emu import EmuAccelerator

        return EmuAccelerator()
    return device.type


def lanes_of(recording: Recording) -> dict[str, Any]:
    """Return how long the step took, how busy each lane was, and the bandwidth of each copy lane while it was busy."""
    seconds = {lane.value: recording.busy_seconds(lane) for lane in Lane}
    moved = {lane.value: sum(span.num_bytes for span in recording.lane(lane)) for lane in (Lane.H2D, Lane.D2H)}
    rates = {name: moved[name] / seconds[name] / 1e9 if seconds[name] else None for name in moved}
    return {
        "k": recording.k,
        "k_prime": recording.k_prime,
        "num_units": len(recording.unit_names),
        "emulated": recording.emulated,
        "step_s": recording.duration_s,
        "stall_s": recording.stall_seconds,
        "busy_s": seconds,
        "moved_bytes": moved,
        "gb_s_while_busy": rates,
        "peak_bytes": recording.peak.total if recording.peak else None,
    }
