"""Measures a device's compute, the device's own memory, and files of a folder."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.rates import ComputeRate, DiskRate, DiskRoute, MemoryRate, Work

__all__ = ["measure_compute", "measure_disk", "measure_launch", "measure_memory", "synchronize"]

_LEAST_SECONDS = 5e-3  # of a sample: shorter work is repeated, for the clock and the start of kernels
_MAX_REPEATS = 1000
_NUM_LINKS = 100
_DIRECT = getattr(os, "O_DIRECT", 0)


def synchronize(device: torch.device) -> None:
    """Wait for everything that was started on the device; on the CPU nothing is ever under way."""
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "synchronize"):
        module.synchronize(device)


def measure_compute(device: torch.device, dtype: torch.dtype, width: int, num_samples: int = 5) -> ComputeRate:
    """Time products of two square matrices.

    Raises:
        torch.OutOfMemoryError: the device has no room for three of them.
    """
    left, right = (torch.ones(width, width, dtype=dtype, device=device) for _ in range(2))
    result = torch.empty_like(left)
    seconds = _sample(device, lambda: torch.mm(left, right, out=result), num_samples)
    return ComputeRate(str(dtype).removeprefix("torch."), 2 * width**3, seconds)


def measure_memory(device: torch.device, num_bytes: int, num_samples: int = 5, work: Work = Work.PLAIN) -> MemoryRate:
    """Time an operation on single elements that reads and writes so many bytes altogether.

    Raises:
        torch.OutOfMemoryError: the device has no room for them.
    """
    source = torch.ones(max(1, num_bytes // 8), device=device)
    target = torch.empty_like(source)
    operations: dict[Work, Callable[[], object]] = {
        Work.PLAIN: lambda: torch.mul(source, 2.0, out=target),
        Work.FUNCTION: lambda: torch.ops.aten.gelu.out(source, out=target),
        Work.RANDOM: lambda: target.bernoulli_(0.5),
    }
    return MemoryRate(2 * source.nbytes, _sample(device, operations[work], num_samples), work)


def measure_launch(device: torch.device) -> float:
    """Return the least that an operation takes, forward or backward, however small; seconds."""
    factor, start = torch.ones(1, device=device), torch.ones(1, device=device, requires_grad=True)

    def chain() -> None:
        value = start
        for _ in range(_NUM_LINKS):
            value = value * factor
        value.sum().backward()  # type: ignore[no-untyped-call]

    return min(_sample(device, chain, 3)) / (2 * _NUM_LINKS)


def _sample(device: torch.device, work: Callable[[], object], num_samples: int) -> tuple[float, ...]:
    """Return the time of one piece of work, several times; each sample is long enough for the clock."""

    def run(repeats: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        return (time.perf_counter() - began) / repeats

    run(1)  # loads kernels and takes memory
    repeats = max(1, min(_MAX_REPEATS, math.ceil(_LEAST_SECONDS / max(run(1), 1e-9))))
    return tuple(run(repeats) for _ in range(num_samples))


def measure_disk(folder: Path, num_bytes: int, num_samples: int = 3) -> tuple[DiskRate, DiskRate]:
    """Time reading and writing of a file of so many bytes; it is gone afterwards.

    Args:
        folder: on the disk in question. Past the page cache where the file system allows it.
        num_bytes: of the file; rounded up to whole pages.

    Raises:
        SuperpipeError: the folder cannot be written.
    """
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # begins at a page, as direct ones ask
    with contextlib.suppress(AttributeError, OSError):  # as the engine's buffers; other systems have no large pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(os.urandom(min(size, 1 << 20)) * (size // min(size, 1 << 20)))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="superpipe-disk-") as place:
            path = Path(place, "file")
            flags = _DIRECT if _takes_direct(path) else 0
            writes = tuple(_write(path, buffer, flags) for _ in range(num_samples))
            reads = tuple(_read(path, buffer, flags) for _ in range(num_samples))
    except OSError as error:
        raise SuperpipeError(
            f"disk={str(folder)!r} cannot be measured: {error}. Give a folder that can be written."
        ) from error
    is_direct = flags != 0
    return DiskRate(DiskRoute.READ, is_direct, size, reads), DiskRate(DiskRoute.WRITE, is_direct, size, writes)


def _takes_direct(path: Path) -> bool:
    """Whether files there can be opened past the page cache; file systems in memory refuse."""
    if not _DIRECT:
        return False
    try:
        with _opened(path, os.O_WRONLY | os.O_CREAT | _DIRECT):
            return True
    except OSError:
        return False


def _write(path: Path, buffer: mmap.mmap, flags: int) -> float:
    began = time.perf_counter()
    with _opened(path, os.O_WRONLY | os.O_CREAT | flags) as file:
        _transfer(len(buffer), lambda done: os.pwrite(file, memoryview(buffer)[done:], done))
        os.fsync(file)
    return time.perf_counter() - began


def _read(path: Path, buffer: mmap.mmap, flags: int) -> float:
    with _opened(path, os.O_RDONLY | flags) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        _transfer(len(buffer), lambda done: os.preadv(file, [memoryview(buffer)[done:]], done))
        return time.perf_counter() - began


def _transfer(num_bytes: int, step: Callable[[int], int]) -> None:
    """Go on until all bytes are through: the system may take fewer at a time."""
    done = 0
    while done < num_bytes:
        moved = step(done)
        if not moved:
            raise OSError(f"only {done} of {num_bytes} bytes were transferred")
        done += moved


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)
