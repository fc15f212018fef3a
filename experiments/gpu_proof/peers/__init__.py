"""Who takes part: one file each, with the settings that its own documentation calls best for this purpose.

A file has ``PACKAGE`` (the module that must be importable, or None), ``DEVICES`` (kinds that it runs on),
``prepare(job, device) -> Contender``, and ``BUILD_SECONDS`` if it compiles something at first use. A new peer is a new
file, and a line in ``stages/peers.py``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_proof.job import CannotRun, Job
from experiments.gpu_proof.network import loss_of

__all__ = [
    "Contender",
    "build_seconds_of",
    "devices_of",
    "inference_step",
    "keep_builds_apart",
    "prepare",
    "training_step",
]


@dataclass
class Contender:
    """Something that trains or infers.

    Attributes:
        step: one training step, or one forward pass, on tokens that are on the device; returns a scalar: the loss, or
            the mean of the logits.
        note: settings worth knowing beside its figures.
        finish: called in the end; returns what else it knows.
    """

    step: Callable[[Tensor], Tensor]
    note: str = ""
    finish: Callable[[], dict[str, Any]] = field(default=dict)


def devices_of(peer: str) -> tuple[str, ...]:
    """Return the kinds of devices that a peer runs on."""
    devices: tuple[str, ...] = _module_of(peer).DEVICES
    return devices


def build_seconds_of(peer: str) -> float:
    """Return how much longer than others a peer may take, because it compiles at its first use."""
    return float(getattr(_module_of(peer), "BUILD_SECONDS", 0.0))


def keep_builds_apart() -> None:
    """Let what a peer compiles go to a folder of this harness alone, free of locks that a stopped process left."""
    folder = Path(tempfile.gettempdir()) / "superpipe_gpu_proof_extensions"
    for lock in folder.glob("*/lock"):
        lock.unlink(missing_ok=True)
    folder.mkdir(exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)


def prepare(job: Job, device: torch.device) -> Contender:
    """Return the job's contender, ready for its first step.

    Raises:
        ModuleNotFoundError: its package is not installed.
        CannotRun: it does not run on this kind of device.
    """
    module = _module_of(job.peer)
    if module.PACKAGE is not None and find_spec(module.PACKAGE) is None:
        raise ModuleNotFoundError(f"package {module.PACKAGE!r} is not installed", name=module.PACKAGE)
    if device.type not in module.DEVICES:
        raise CannotRun(f"{job.peer} runs on {', '.join(module.DEVICES)}, not on {device.type}")
    contender: Contender = module.prepare(job, device)
    return contender


def _module_of(peer: str) -> Any:
    return import_module(f"{__name__}.{peer}")


def training_step(model: Any, optimizer: Any) -> Callable[[Tensor], Tensor]:
    """Return the loop body that everybody writes: gradients off, forward, backward, update."""

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def inference_step(model: Any) -> Callable[[Tensor], Tensor]:
    """Return one forward pass over the batch without gradients."""

    def step(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids).logits
        return logits.float().mean()

    return step
