"""What the disk gives: to a plain loop over one file, and to the store's own reads and writes of the same sizes."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_superpipe.config import Disk
from lightning_superpipe.tiers import DiskTier, Folder
from lightning_superpipe.tiers.host import HostSlab
from lightning_superpipe.tiers.requests import Requests

Rates = dict[str, list[float]]


# Units pass through more memory than the processor's caches hold, whoever moves them.
_NUM_PLACES = 12
_PAGES = (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE)


def measure(folder: Path, slab_bytes: int, num_slabs: int, rounds: int, *, with_others: bool = False) -> Rates:
    """Return bytes per second of each way, a figure for each round; ways take turns.

    Args:
        with_others: also the plain loop from small pages, and the one that uses the same memory for every unit.
    """
    found: Rates = defaultdict(list)
    options = Disk(folder=str(folder / "rates"))
    place = Folder(options)
    requests = Requests(options.requests)
    tier = DiskTier("weights", place, requests, options)
    slabs = [tier.allocate(slab_bytes) for _ in range(num_slabs)]
    rooms = [HostSlab(slabs[0].room_bytes, pin=False).bytes.fill_(1) for _ in range(_NUM_PLACES)]
    moves = list(zip(slabs, itertools.cycle(rooms), strict=False))
    plain = folder / "plain.bytes"
    descriptor = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(descriptor, 0, slabs[0].room_bytes * num_slabs)
    large, small = ([_memory(slabs[0].room_bytes, pages) for _ in moves[:_NUM_PLACES]] for pages in _PAGES)
    for number in range(rounds + 1):  # the first writes to fresh blocks, and is left out
        plainly = partial(_plainly, descriptor=descriptor, count=num_slabs)
        took = {
            "plain_write": _seconds(partial(plainly, os.pwritev, large)),
            "store_write": _seconds(lambda: [slab.store(room) for slab, room in moves]),
            "plain_read": _seconds(partial(plainly, os.preadv, large)),
            "store_read": _seconds(lambda: [slab.fetch(room) for slab, room in moves]),
        }
        for way, call in (("write", os.pwritev), ("read", os.preadv)) if with_others else ():
            took[f"small_pages_{way}"] = _seconds(partial(plainly, call, small))
            took[f"same_memory_{way}"] = _seconds(partial(plainly, call, large[:1]))
        for name, seconds in took.items() if number else ():
            found[name].append(slabs[0].room_bytes * num_slabs / seconds)
    os.close(descriptor)
    plain.unlink()
    tier.close()
    requests.close()
    place.close()
    return found


def plain_rates(around: list[Rates]) -> tuple[float, float]:
    """Bytes per second that a plain loop reads and writes, medians of several measurements."""
    read, write = (
        statistics.median([rate for rates in around for rate in rates[name]]) for name in ("plain_read", "plain_write")
    )
    return read, write


def _plainly(
    call: Callable[[int, list[mmap.mmap], int], int], places: list[mmap.mmap], *, descriptor: int, count: int
) -> None:
    """One request after the other, each as large as a unit."""
    for number, memory in zip(range(count), itertools.cycle(places), strict=False):
        if call(descriptor, [memory], number * len(memory)) != len(memory):
            raise OSError("a request came back short")


def _memory(size: int, pages: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(pages)
    memory.write(bytes(size))
    return memory


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
