"""Runs one job and writes down how it ended, whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_superpipe.sweeps.row import JobResult, Row

__all__ = ["record_job"]


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
    raise NotImplementedError
