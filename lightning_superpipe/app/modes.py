"""What a run does: one function for each mode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_superpipe.adapters.strategy import SuperpipeMixin
from lightning_superpipe.app.assembly import Parts, assemble
from lightning_superpipe.app.steps import StepClock
from lightning_superpipe.errors import ConfigError
from lightning_superpipe.sweeps import JobResult, Row, record_job

__all__ = ["MODES", "run"]


@dataclass(frozen=True)
class Job:
    """One run of the application.

    Attributes:
        config: composed, with everything that was asked.
        folder: what the run writes goes there.
        sweep_folder: of all jobs of the sweep; the same as ``folder`` where there is none.
        is_sweep: it is one of many.
    """

    config: DictConfig
    folder: Path
    sweep_folder: Path
    is_sweep: bool

    @classmethod
    def current(cls, config: DictConfig) -> Job:
        """Return the job that Hydra is about to run."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        is_sweep = hydra.mode is RunMode.MULTIRUN
        return cls(config, folder, Path(hydra.sweep.dir).absolute() if is_sweep else folder, is_sweep)

    def plain_config(self) -> dict[str, Any]:
        """Return what was asked as plain values, without the folder: equal for equal jobs."""
        config = self.config.copy()
        config.output_dir = "."
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}


def run(config: DictConfig) -> float | None:
    """Do what ``config.mode`` says; return what a search makes small, if anything.

    Raises:
        SuperpipeError: something was asked that cannot be done.
    """
    if config.mode not in MODES:
        raise ConfigError(f"mode={config.mode}: allowed are {', '.join(MODES)}.")
    job = Job.current(config)
    (job.folder / "config.yaml").write_text(OmegaConf.to_yaml(job.config, resolve=True), encoding="utf-8")
    return MODES[config.mode](job)


def train(job: Job) -> float | None:
    """Fit, and write the row of the job."""
    return _recorded(job, lambda: _fit(job))


def bench(job: Job) -> float | None:
    """Time some steps without validation, callbacks and loggers, and write the row of the job."""
    return _recorded(job, lambda: _bench(job))


def _recorded(job: Job, work: Callable[[], JobResult]) -> float | None:
    row: Row = record_job(job.sweep_folder, job.plain_config(), work, is_sweep=job.is_sweep)
    return row.objective()


def _fit(job: Job) -> JobResult:
    clock = StepClock()
    parts = assemble(job.config, [clock])
    parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    return _result(parts, clock)


def _bench(job: Job) -> JobResult:
    wanted = job.config.bench
    clock = StepClock(wanted.num_warmup_steps)
    parts = assemble(
        job.config,
        max_steps=wanted.num_warmup_steps + wanted.num_steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    return _result(parts, clock)


def _result(parts: Parts, clock: StepClock) -> JobResult:
    """Return the numbers of a run that trained, and show its report."""
    strategy, metrics = parts.trainer.strategy, parts.trainer.callback_metrics
    report = strategy.report() if isinstance(strategy, SuperpipeMixin) else None
    if report is not None:
        Console().print(report)
    print(f"{clock.step_ms:.1f} ms/step, loss {clock.loss:.4f} after {clock.num_steps} steps", file=sys.stdout)
    return JobResult(
        loss=clock.loss,
        step_ms=clock.step_ms,
        metrics={name: float(value) for name, value in metrics.items()},
        report=report,
        num_parameters=sum(parameter.numel() for parameter in parts.module.parameters()),
        device=str(strategy.root_device),
    )


def evaluate(job: Job) -> None:
    """Test where data and module know how, validate otherwise."""
    parts = assemble(job.config)
    tests = is_overridden("test_dataloader", parts.data) and is_overridden("test_step", parts.module)
    measure = parts.trainer.test if tests else parts.trainer.validate
    measure(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)


def predict(job: Job) -> None:
    """Predict, and write what came."""
    parts = assemble(job.config)
    batches = parts.trainer.predict(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    path = job.folder / "predictions.pt"
    torch.save(batches, path)
    print(f"{len(batches or [])} batches of predictions: {path}")


MODES: dict[str, Callable[[Job], float | None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "bench": bench,
}
"""Every mode, by its word on the command line."""
