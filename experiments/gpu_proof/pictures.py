"""The sweep as a picture: peak device memory against step time, drawn from its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.gpu_proof.job import Outcome
from experiments.gpu_proof.result import StageResult
from lightning_superpipe.observe import PeakBytes
from lightning_superpipe.sweeps.picture import draw_trade_off
from lightning_superpipe.sweeps.row import Row, Status

__all__ = ["draw_sweep"]


def draw_sweep(results: Sequence[StageResult], folder: Path) -> list[Path]:
    """Write ``sweep.svg`` and ``sweep-dark.svg``; nothing without a sweep, or of an emulation.

    Raises:
        SuperpipeError: the sweep has no numbers; matplotlib is missing.
    """
    sweep = next((result for result in results if result.stage == "sweep"), None)
    if sweep is None or sweep.emulated:
        return []
    rows = [_row(sweep, outcome) for outcome in sweep.outcomes if outcome.is_ok]
    paths = [(folder / "sweep.svg", False), (folder / "sweep-dark.svg", True)]
    for path, dark in paths:
        draw_trade_off(rows, path, dark=dark)
    return [path for path, _ in paths]


def _row(result: StageResult, outcome: Outcome) -> Row:
    """Return a process's outcome as a row of a sweep; the peak is the device allocator's, not divided by kind."""
    told, seconds = outcome.report, outcome.report["step_seconds"]
    streamed = told.get("superpipe", {})
    peak = outcome.device_peak_bytes
    return Row(
        fingerprint=outcome.job.name,
        status=Status.FINISHED,
        config=dataclasses.asdict(outcome.job),
        versions=result.versions,
        machine=result.machine,
        seconds=outcome.seconds,
        device=told["device"],
        emulated=result.emulated,
        k=outcome.job.k,
        k_prime=outcome.job.k_prime if outcome.job.k else None,
        num_units=int(streamed["num_units"]) if streamed else None,
        step_ms=1e3 * sum(seconds) / len(seconds),
        peak=None if peak is None or not outcome.job.k else PeakBytes(activations=peak),
        resident_bytes=int(streamed["resident_bytes"]) if streamed else None,
    )
