"""Runs one job in a process of its own and looks at it from outside: the same way for every contender."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from experiments.gpu_proof import tasks
from experiments.gpu_proof.job import Job, Outcome, Status
from experiments.gpu_proof.nvml import DriverView
from experiments.gpu_proof.peers import build_seconds_of

__all__ = ["Deadline", "Watcher"]

_POLL_S = 0.02
_LEAST_S = 5.0  # with less left a process is not started
_EXIT_S = 20.0  # a process that has told everything may take so long to leave


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock."""

    moment: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the moment in so many seconds."""
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds until then, negative afterwards."""
        return self.moment - time.monotonic()


class Watcher:
    """Starts processes, polls their memory, and stops them when their time is up.

    Args:
        device_type: on CUDA each process is a fresh interpreter; elsewhere it is forked from a server that has
            imported the libraries, which saves seconds and is not safe once a driver is open.
        logs: folder for what processes print.
    """

    def __init__(self, device_type: str, logs: Path) -> None:
        self._context: Any = multiprocessing.get_context("spawn" if device_type == "cuda" else "forkserver")
        if device_type != "cuda":
            self._context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", tasks.__name__])
        self._logs = logs
        self._driver = DriverView()

    @property
    def driver(self) -> str | None:
        """Version of the device's driver; None where it does not say."""
        return self._driver.driver

    def run(self, job: Job, deadline: Deadline) -> Outcome:
        """Run one job to its end, or to that of its time.

        A process tells ``begin`` when what follows is training alone, and ``end`` with its status and report.
        """
        limit_s = min(job.scale.run_seconds + _build_seconds(job), deadline.left_s)
        if limit_s < _LEAST_S:
            return Outcome(job, Status.LATE, "not started: the stage's minutes are over")
        self._logs.mkdir(parents=True, exist_ok=True)
        log, began = self._logs / f"{job.name}.log", time.monotonic()
        mine, theirs = self._context.Pipe(duplex=False)
        before = self._driver.used_bytes
        process = self._context.Process(target=tasks.run, args=(job, theirs, str(log)), daemon=False)
        process.start()
        theirs.close()
        view = _View(process, self._driver)
        told = _follow(mine, view, Deadline(began + limit_s))
        was_stopped = _end(process, patience_s=_EXIT_S if told or began + limit_s > time.monotonic() else 0.0)
        if told is None and was_stopped:
            told = (Status.LATE, f"stopped after {limit_s:.0f} s", {})
        status, reason, report = told or _untold(process, log)
        used = None if before is None or view.device_used is None else max(0, view.device_used - before)
        seconds = time.monotonic() - began
        return Outcome(job, status, reason, seconds, view.training_peak, view.life_peak, used, report)


def _build_seconds(job: Job) -> float:
    return build_seconds_of(job.peer) if job.peer else 0.0


class _View:
    """Peaks of one process so far, bytes."""

    def __init__(self, process: BaseProcess, driver: DriverView) -> None:
        self._driver, self.training_peak, self.life_peak = driver, 0, 0
        self.device_used: int | None = None
        self.is_training = False
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(process.pid)

    def look(self) -> None:
        resident = 0
        with contextlib.suppress(psutil.Error, AttributeError):
            family = [self._process, *self._process.children(recursive=True)]
            resident = sum(each.memory_info().rss for each in family)
        self.life_peak = max(self.life_peak, resident)
        if self.is_training:
            self.training_peak = max(self.training_peak, resident)
        used = self._driver.used_bytes
        if used is not None:
            self.device_used = max(self.device_used or 0, used)


def _follow(told: Connection, view: _View, deadline: Deadline) -> tuple[Status, str, dict[str, Any]] | None:
    """Poll until the process has told its end, is gone, or is late; return what it told."""
    while deadline.left_s > 0:
        view.look()
        try:
            if not told.poll(_POLL_S):
                continue
            word, *rest = told.recv()
        except (EOFError, OSError):
            return None
        if word == "begin":
            view.is_training = True
        else:
            return (Status(rest[0]), rest[1], rest[2])
    return None


def _end(process: BaseProcess, patience_s: float) -> bool:
    """Wait for a process that is about to leave, then stop it and its children; say whether that was needed."""
    process.join(patience_s)
    is_alive = process.exitcode is None
    if is_alive and process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, see tasks.run
        process.kill()
    process.join()
    return is_alive


def _untold(process: BaseProcess, log: Path) -> tuple[Status, str, dict[str, Any]]:
    """Say of a process that ended without a word why."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    if process.exitcode == -signal.SIGKILL:
        return Status.NO_MEMORY, f"killed from outside, as a host without memory does ({last})", {}
    return Status.FAILED, f"the process ended with {process.exitcode}: {last}", {}
