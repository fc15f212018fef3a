"""Measures a machine: copies of several sizes each way and both ways at once, and fused updates on the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from lightning_superpipe.observe.machine import CopyRate, MachineProfile, Route, UpdateRate
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
    num_samples: int = 5,
) -> MachineProfile:
    """Measure everything.

    Args:
        device: the other end of the copies.
        copy_bytes: sizes of copies.
        num_parameters: updated in each step.
        threads: numbers of threads to update with.
        dtypes: of weights, gradients and states.
        num_samples: of each figure, after one that does not count.
    Raises:
        torch.OutOfMemoryError: the device has no room for the largest copy.
    Cost: host memory of twice the largest copy, and of four times the updated parameters.
    """
    kinds = (True, False) if device.type == "cuda" else (False,)
    copies = [
        measure_copies(device, route, num_bytes, pinned=pinned, num_samples=num_samples)
        for pinned in kinds
        for route in Route
        for num_bytes in copy_bytes
    ]
    updates = [measure_updates(num_parameters, dtype, count, num_samples) for dtype in dtypes for count in threads]
    emulated = device.type != "cuda"
    return MachineProfile(str(device), emulated, tuple(copies), tuple(updates), software_versions())


def measure_copies(
    device: torch.device, route: Route, num_bytes: int, *, pinned: bool, num_samples: int = 5
) -> CopyRate:
    """Time copies of one size; a thread for each direction, because copies of pageable memory block their caller.

    Raises:
        torch.OutOfMemoryError: the device has no room for the copy.
    """
    routes = (Route.H2D, Route.D2H) if route is Route.BOTH else (route,)
    repeats = max(1, min(_MAX_REPEATS, _SAMPLE_BYTES // max(num_bytes, 1)))
    start, jobs = Barrier(len(routes) + 1), []
    for one in routes:
        jobs.append(_copying(device, one, num_bytes, pinned=pinned, repeats=repeats, start=start))
    seconds = []
    with ThreadPoolExecutor(len(routes)) as pool:
        for _ in range(num_samples + 1):
            _synchronize(device)
            running = [pool.submit(job) for job in jobs]
            start.wait()
            began = time.perf_counter()
            for job in running:
                job.result()
            seconds.append((time.perf_counter() - began) / repeats)
    return CopyRate(route, pinned, num_bytes, tuple(seconds[1:]))


def _copying(
    device: torch.device, route: Route, num_bytes: int, *, pinned: bool, repeats: int, start: Barrier
) -> Callable[[], None]:
    """Return a job that copies on a stream of its own as soon as all are ready."""
    home = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    away = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    source, target = (home, away) if route is Route.H2D else (away, home)
    stream = torch.Stream(device) if device.type == "cuda" else None

    def copy() -> None:
        start.wait()
        with stream or contextlib.nullcontext():
            for _ in range(repeats):
                target.copy_(source, non_blocking=True)
        if stream is not None:
            stream.synchronize()

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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
