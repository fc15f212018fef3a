"""What happens inside a job's process: the device is opened, the task runs, and the end is told."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.gpu_proof import peers
from experiments.gpu_proof.job import CannotRun, Job, Status
from experiments.gpu_proof.network import make_batch
from experiments.gpu_proof.traced import trace
from lightning_superpipe import SuperpipeError
from lightning_superpipe.observe.measure import measure_machine
from lightning_superpipe.sweeps.machine import describe_machine

__all__ = ["run"]

Begin = Callable[[], None]


def run(job: Job, parent: Connection, log: str) -> None:
    """Do a job and tell the parent ``begin`` and ``end``; whatever is printed goes to the log."""
    os.setsid()  # so that the parent can stop what this process may start
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    try:
        report = TASKS[job.task](job, lambda: parent.send(("begin",)))
        end = ("end", Status.OK.value, "", report)
    except Exception as error:
        traceback.print_exc()
        end = ("end", status_of(error).value, _sentence(error), {})
    sys.stdout.flush()
    parent.send(end)
    parent.close()


def status_of(error: Exception) -> Status:
    """Say what kind of end an error is.

    >>> status_of(torch.OutOfMemoryError("tried to allocate")), status_of(CannotRun("no")), status_of(KeyError("k"))
    (<Status.NO_MEMORY: 'out of memory'>, <Status.REFUSED: 'refused'>, <Status.FAILED: 'failed'>)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower():
        return Status.NO_MEMORY
    if isinstance(error, ModuleNotFoundError):
        return Status.MISSING
    if isinstance(error, CannotRun | SuperpipeError):
        return Status.REFUSED
    return Status.FAILED


def _sentence(error: Exception) -> str:
    """Return the first line of an error, cut where a table would break."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def open_device(job: Job) -> torch.device:
    """Return the job's device, capped as it asks.

    Raises:
        CannotRun: there is no such device, or it cannot be capped.
    """
    if job.device == "emu":
        from tests import emu

        try:
            device = emu.load()
        except emu.EmuUnavailable as reason:
            raise CannotRun(str(reason)) from reason
        emu.set_capacity(job.cap_bytes)
        return device
    if job.device == "cpu":
        if job.cap_bytes is not None:
            raise CannotRun("a CPU's memory is the host's: there is no device memory to cap")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotRun("torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if job.cap_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_bytes / total), device)
    return device


def measure(job: Job, begin: Begin) -> dict[str, Any]:
    """Run a contender's steps on one batch; the clock is read between steps, the device waited for at both ends."""
    device = open_device(job)
    contender = peers.prepare(job, device)
    scale, ids = job.scale, make_batch(job).to(device)
    results = [contender.step(ids) for _ in range(scale.num_warm_up)]
    _synchronize(device)
    begin()
    moments = [time.perf_counter()]
    for _ in range(scale.num_steps):
        results.append(contender.step(ids))
        moments.append(time.perf_counter())
    _synchronize(device)
    moments[-1] = time.perf_counter()
    return {
        "device": str(device),
        "step_seconds": [end - start for start, end in pairwise(moments)],
        "losses": [float(result) for result in results],
        "tokens_per_step": ids.numel(),
        "note": contender.note,
        **_device_bytes(device),
        **contender.finish(),
    }


def _device_bytes(device: torch.device) -> dict[str, int]:
    """What the device's allocator counted since the process began; nothing on a CPU, where nobody counts."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"device_peak_bytes": allocated, "device_reserved_bytes": reserved}
    if device.type == "emu":
        from tests import emu

        return {"device_peak_bytes": emu.peak_bytes()}
    return {}


def profile(job: Job, begin: Begin) -> dict[str, Any]:
    """Measure the machine."""
    scale = job.scale
    threads = [count for count in scale.threads if count <= (os.cpu_count() or 1)]
    begin()
    return measure_machine(
        open_device(job), copy_bytes=scale.copy_bytes, num_parameters=scale.num_updated, threads=threads
    ).to_dict()


def facts(job: Job, begin: Begin) -> dict[str, Any]:
    """Describe the machine."""
    return {**describe_machine(), "cuda": str(torch.version.cuda)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trace(job: Job, begin: Begin) -> dict[str, Any]:
    return trace(job, open_device(job), begin)


TASKS: dict[str, Callable[[Job, Begin], dict[str, Any]]] = {
    "train": measure,
    "infer": measure,
    "profile": profile,
    "facts": facts,
    "trace": _trace,
}
