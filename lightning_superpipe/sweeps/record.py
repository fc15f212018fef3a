"""Runs one job and writes down how it ended, whatever happens in it."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_superpipe.errors import SuperpipeError, TransferError
from lightning_superpipe.observe.trace import software_versions
from lightning_superpipe.sweeps.files import fingerprint, known_row, write_row
from lightning_superpipe.sweeps.machine import describe_machine
from lightning_superpipe.sweeps.row import JobResult, Row, Status

__all__ = ["record_job"]

_log = logging.getLogger(__name__)


def record_job(folder: Path, config: Mapping[str, Any], run: Callable[[], JobResult], *, is_sweep: bool) -> Row:
    """Run a job unless its result is known, write its row, and return it.

    Args:
        folder: of the whole sweep (``hydra.sweep.dir``), the same for all its jobs; of the run if there is no sweep.
        config: everything that was asked, as plain values (str, int, float, bool, None, lists and dicts of these).
            Leave out paths of this very run: a job is recognised by its config and the versions of the software.
        run: does the work. Nothing of the job may outlive it.
        is_sweep: a refused or failed job is written down and returned, so that the next one can run; a job whose row
            in the folder is finished is not run again. Alone, a job always runs and its error is raised.

    Returns:
        The row; ``row.objective(memory_cap_bytes)`` is what a search makes small.
    Raises:
        SuperpipeError: the row cannot be written; earlier rows are intact.
    """
    asked = _asked(config)
    if is_sweep:
        known = known_row(folder, asked.fingerprint)
        if known is not None and known.is_finished:
            _log.info("finished before, so it is not run again: %s in %s", known.fingerprint, folder)
            return known
    start, error = time.perf_counter(), None
    try:
        row = _finished(asked, run())
    except Exception as raised:
        row, error = _ended_badly(asked, raised), None if is_sweep else raised
    _release_memory()
    row = replace(row, seconds=round(time.perf_counter() - start, 3))
    write_row(folder, row)
    if error is not None:
        raise error
    return row


def _asked(config: Mapping[str, Any]) -> Row:
    """Return the row of a job that has not ended yet; it counts as failed until it has."""
    versions = software_versions()
    streaming = config.get("superpipe") or {}
    return Row(
        fingerprint=fingerprint(config, versions),
        status=Status.FAILED,
        config=dict(config),
        versions=versions,
        machine=describe_machine(),
        seconds=0.0,
        k=streaming.get("k"),
        k_prime=streaming.get("k_prime"),
    )


def _finished(asked: Row, result: JobResult) -> Row:
    row = replace(
        asked,
        status=Status.FINISHED,
        loss=result.loss,
        step_ms=result.step_ms,
        metrics=dict(result.metrics),
        num_parameters=result.num_parameters,
        predicted_peak_bytes=result.predicted_peak_bytes,
        device=result.device,
    )
    report = result.report
    if report is None:
        return row
    return replace(
        row,
        device=report.device,
        emulated=report.emulated,
        k=report.k,
        k_prime=report.k_prime,
        num_units=report.num_units,
        num_steps=report.num_steps,
        peak=report.peak,
        resident_bytes=report.resident_bytes,
        host_bytes=report.host_bytes,
        num_loads=report.last_step.num_loads,
        num_plan_misses=report.num_plan_misses,
        h2d_bytes=report.last_step.h2d_bytes,
        d2h_bytes=report.last_step.d2h_bytes,
        stall_ms=1e3 * report.stall_seconds / max(report.num_steps, 1),
    )


def _ended_badly(asked: Row, error: Exception) -> Row:
    """Return the row of a job that raised: our refusals speak for themselves, all else leaves its traceback."""
    if isinstance(error, SuperpipeError) and not isinstance(error, TransferError):
        return replace(asked, status=Status.REFUSED, error=str(error))
    return replace(asked, status=Status.FAILED, error="".join(traceback.format_exception(error)))


def _release_memory() -> None:
    """Give back what the job held: the next one needs it."""
    import torch  # rows are read without it

    gc.collect()  # trainers and modules hold each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
