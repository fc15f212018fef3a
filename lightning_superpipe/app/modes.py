"""What a run does: one function for each mode, whose docstring is its line in ``superpipe --help``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig
from rich.console import Console

from lightning_superpipe.adapters.strategy import SuperpipeMixin
from lightning_superpipe.app.assembly import Parts, assemble, build, build_without_memory, first_batch
from lightning_superpipe.app.job import Job
from lightning_superpipe.app.predictions import write_predictions
from lightning_superpipe.app.quiet import quieten
from lightning_superpipe.app.steps import StepClock
from lightning_superpipe.errors import ConfigError, SuperpipeError, UnsupportedError
from lightning_superpipe.forecast.machine import kept_profile
from lightning_superpipe.forecast.plan import forecast_of, profile_of
from lightning_superpipe.forecast.played import play
from lightning_superpipe.forecast.preview import predicted_peak_bytes, preview
from lightning_superpipe.observe import shipped_names, write_recording
from lightning_superpipe.option_checks import parse_bytes
from lightning_superpipe.sweeps import JobResult, record_job

__all__ = ["MODES", "run"]

_RECORDED_STEP = 2  # like all later ones

# What a measurement leaves out.
_BARE: dict[str, Any] = {
    "logger": False,
    "limit_val_batches": 0,
    "max_epochs": -1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def run(config: DictConfig) -> float | None:
    """Do what ``config.mode`` says; return what a search makes small, None where there is nothing to search.

    Raises:
        SuperpipeError: something was asked that cannot be done.
    """
    if config.mode not in MODES:
        raise ConfigError(f"mode={config.mode}: allowed are {', '.join(MODES)}.")
    quieten()
    job = Job.current(config)
    job.save_config()
    return MODES[config.mode](job)


def train(job: Job) -> float | None:
    """Fit, then report memory and traffic (the default)."""

    def fit() -> JobResult:
        clock = StepClock()
        return _fit(job, assemble(job.config, [clock]), clock)

    return _recorded(job, fit)


def bench(job: Job) -> float | None:
    """Time some training steps, without validation, logger and checkpoint."""

    def fit() -> JobResult:
        asked = job.config.bench
        clock = StepClock(asked.num_warmup_steps)
        num_steps = asked.num_warmup_steps + asked.num_steps
        return _fit(job, assemble(job.config, max_steps=num_steps, callbacks=[clock], **_BARE), clock)

    return _recorded(job, fit)


def evaluate(job: Job) -> None:
    """Measure on held-out data: test where module and data have one, else validate."""
    parts = assemble(job.config)
    tests = is_overridden("test_dataloader", parts.data) and is_overridden("test_step", parts.module)
    measure = parts.trainer.test if tests else parts.trainer.validate
    measure(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    _show_report(parts)


def predict(job: Job) -> None:
    """Predict, and write what came: predictions.jsonl for texts, else predictions.pt."""
    parts = assemble(job.config)
    batches = parts.trainer.predict(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    path = write_predictions(batches or [], job.folder)
    _show_report(parts)
    print(f"{len(batches or [])} batches of predictions: {path}")


def plan(job: Job) -> None:
    """Print units, window and plan, and what a run would take on device=NAME; nothing runs."""
    config = job.config
    strategy = build(config.superpipe, "superpipe")
    if not isinstance(strategy, SuperpipeMixin):
        raise _nothing_streams("plan")
    module = build_without_memory(config)
    print(preview(module, strategy.config))
    print()
    profile = kept_profile() if config.device is None else profile_of(config.device)
    if profile is None:
        print(
            f"Times and activations: device=NAME predicts for one of {', '.join(shipped_names())}; `superpipe profile` "
            "measures this machine."
        )
        return
    if not config.data:
        print("Times and activations need a batch: choose data=NAME.")
        return
    batch = first_batch(config)
    played = play(module, batch, strategy.config, precision=str(config.trainer.get("precision", "32-true")))
    print(forecast_of(profile, played, strategy.config))


def trace(job: Job) -> None:
    """Record one training step: trace.json for https://ui.perfetto.dev, and pictures."""
    config = job.config.copy()
    if "record_step" not in config.superpipe:
        raise _nothing_streams("trace")
    if config.superpipe.record_step is None:
        config.superpipe.record_step = _RECORDED_STEP
    step = config.superpipe.record_step
    parts = assemble(config, max_steps=step + 1, callbacks=[], **_BARE)
    parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=config.ckpt_path)
    recording = _streaming(parts).recording
    if recording is None:
        raise SuperpipeError(
            f"training ended before step {step} (superpipe.record_step) was over: record an earlier one."
        )
    _show_report(parts)
    try:
        paths = write_recording(recording, job.folder)
    except UnsupportedError as error:
        print(f"No pictures: {error}")
        paths = [job.folder / "trace.json"]
    print(f"{paths[0].parent}: {', '.join(path.name for path in paths)}")
    print("trace.json opens in https://ui.perfetto.dev")


MODES: dict[str, Callable[[Job], float | None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "plan": plan,
    "bench": bench,
    "trace": trace,
}
"""Every mode by its word on the command line."""


def _recorded(job: Job, work: Callable[[], JobResult]) -> float | None:
    """Run a job that leaves a row."""
    row = record_job(job.rows_folder, job.plain_config(), work, is_sweep=job.is_sweep)
    if not row.is_finished:
        print(f"{row.status.value}: {(row.error or '').strip().splitlines()[-1]}")
    cap = job.config.memory_cap
    return row.objective(None if cap is None else parse_bytes(cap))


def _fit(job: Job, parts: Parts, clock: StepClock) -> JobResult:
    parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=job.config.ckpt_path)
    _show_report(parts)
    print(f"{clock.num_steps} steps, {clock.step_ms:.1f} ms each, last loss {clock.loss:.4f}: {job.folder}")
    strategy = parts.trainer.strategy
    streamed: dict[str, Any] = {}
    if isinstance(strategy, SuperpipeMixin):
        report = strategy.report()
        streamed = {"report": report, "predicted_peak_bytes": predicted_peak_bytes(strategy.units, report.k)}
    return JobResult(
        loss=clock.loss,
        step_ms=clock.step_ms,
        metrics={name: float(value) for name, value in parts.trainer.callback_metrics.items()},
        num_parameters=sum(parameter.numel() for parameter in parts.module.parameters()),
        device=str(strategy.root_device),
        **streamed,
    )


def _show_report(parts: Parts) -> None:
    """Print what streaming cost and saved, if anything streamed."""
    if isinstance(parts.trainer.strategy, SuperpipeMixin):
        Console().print(parts.trainer.strategy.report())


def _streaming(parts: Parts) -> SuperpipeMixin:
    strategy = parts.trainer.strategy
    if not isinstance(strategy, SuperpipeMixin):
        raise _nothing_streams("trace")
    return strategy


def _nothing_streams(mode: str) -> ConfigError:
    return ConfigError(f"mode={mode} shows what streams, and with superpipe=off nothing does: leave superpipe=off out.")
