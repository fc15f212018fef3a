"""Measures a machine: copies of several sizes each way and both ways at once, fused updates on the host, compute."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch

from lightning_superpipe.observe.identity import identify, room_of
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.measure_compute import (
    measure_compute,
    measure_disk,
    measure_launch,
    measure_memory,
    synchronize,
)
from lightning_superpipe.observe.rates import CopyRate, DiskRate, Route, UpdateRate, Work
from lightning_superpipe.observe.trace import software_versions

__all__ = ["measure_copies", "measure_machine", "measure_updates"]

_SAMPLE_BYTES = (
    64 << 20
)  # small copies are repeated up to so many bytes: one alone is shorter than the clock is good for
_MAX_REPEATS = 64
_TENSOR_ELEMENTS = 1 << 22  # of one parameter in updates: a large matrix's


def measure_machine(
    device: torch.device,
    *,
    copy_bytes: Sequence[int],
    num_parameters: int,
    threads: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    widths: Sequence[int] = (),
    memory_bytes: Sequence[int] = (),
    disk: Path | None = None,
    disk_bytes: Sequence[int] = (),
    num_samples: int = 5,
    say: Callable[[str], None] = lambda words: None,
) -> MachineProfile:
    """Measure everything.

    Args:
        device: the other end of the copies.
        copy_bytes: sizes of copies.
        num_parameters: updated in each step.
        threads: numbers of threads to update with.
        dtypes: of weights, gradients and states, and of matrices.
        widths: of square matrices that the device multiplies.
        memory_bytes: read and written by single operations on the device.
        disk: a folder on a disk to measure; None measures none.
        disk_bytes: sizes of files there.
        num_samples: of each figure, after one that does not count.
        say: called with a few words whenever something else is measured.
    Raises:
        torch.OutOfMemoryError: the device has no room for the largest copy.
        SuperpipeError: the folder cannot be written.
    Cost: host memory of twice the largest copy, and of four times the updated parameters.
    """
    why_not = _why_not_pinned(device)
    copies = []
    for pinned in (False,) if why_not else (True, False):
        for route in Route:
            say(f"copies {route.value}, {'pinned' if pinned else 'pageable'}")
            copies += [
                measure_copies(device, route, size, pinned=pinned, num_samples=num_samples) for size in copy_bytes
            ]
    say("updates on the host")
    updates = [measure_updates(num_parameters, dtype, count, num_samples) for dtype in dtypes for count in threads]
    say("compute")
    computes = [measure_compute(device, dtype, width, num_samples) for dtype in dtypes for width in widths]
    memory = [measure_memory(device, size, num_samples, work) for work in Work for size in memory_bytes]
    return MachineProfile(
        str(device),
        device.type == "cpu",
        tuple(copies),
        tuple(updates),
        software_versions(),
        computes=tuple(computes),
        memory=tuple(memory),
        disks=() if disk is None else _disks(disk, disk_bytes, say),
        room=room_of(device),
        identity=identify(device),
        launch_s=measure_launch(device) if widths else 0.0,
        why_not_pinned=why_not,
    )


def _disks(folder: Path, sizes: Sequence[int], say: Callable[[str], None]) -> tuple[DiskRate, ...]:
    say(f"files in {folder}")
    return tuple(rate for size in sizes for rate in measure_disk(folder, size))


def _why_not_pinned(device: torch.device) -> str:
    """Return why copies from page-locked memory cannot be measured; empty if they can."""
    try:
        is_pinned = torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    if device.type == "cpu":
        return "device and host are one memory"
    return "" if is_pinned else f"torch gives {device.type!r} none"


def measure_copies(
    device: torch.device, route: Route, num_bytes: int, *, pinned: bool, num_samples: int = 5
) -> CopyRate:
    """Time copies of one size; a thread for each direction, because copies of pageable memory block their caller.

    Raises:
        torch.OutOfMemoryError: the device has no room for the copy.
    """
    routes = (Route.H2D, Route.D2H) if route is Route.BOTH else (route,)
    repeats = max(1, min(_MAX_REPEATS, _SAMPLE_BYTES // max(num_bytes, 1)))
    start, jobs = Barrier(len(routes)), []
    for one in routes:
        jobs.append(_copying(device, one, num_bytes, pinned=pinned, repeats=repeats, start=start))
    seconds = []
    with ThreadPoolExecutor(len(routes)) as pool:
        for _ in range(num_samples + 1):
            synchronize(device)
            running = [pool.submit(job) for job in jobs]
            began, ended = zip(*(job.result() for job in running), strict=True)
            seconds.append((max(ended) - min(began)) / repeats)
    return CopyRate(route, pinned, num_bytes, tuple(seconds[1:]))


def _copying(
    device: torch.device, route: Route, num_bytes: int, *, pinned: bool, repeats: int, start: Barrier
) -> Callable[[], tuple[float, float]]:
    """Return a job that copies on a stream of its own as soon as all are ready, and returns when it began and ended."""
    home = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    away = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    source, target = (home, away) if route is Route.H2D else (away, home)
    stream = torch.Stream(device) if device.type == "cuda" else None

    def copy() -> tuple[float, float]:
        start.wait()
        began = time.perf_counter()
        with stream or contextlib.nullcontext():
            for _ in range(repeats):
                target.copy_(source, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        return began, time.perf_counter()

    return copy


def measure_updates(num_parameters: int, dtype: torch.dtype, num_threads: int, num_samples: int = 5) -> UpdateRate:
    """Time steps of torch's fused AdamW on host tensors."""
    sizes = [_TENSOR_ELEMENTS] * (num_parameters // _TENSOR_ELEMENTS) or [num_parameters]
    parameters = [torch.ones(size, dtype=dtype, requires_grad=True) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    seconds = []
    with _threads(num_threads):
        for _ in range(num_samples + 1):
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
    return UpdateRate(num_threads, sum(sizes), str(dtype).removeprefix("torch."), tuple(seconds[1:]))


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
