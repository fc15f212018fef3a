"""What the disk gives: to a plain loop over one file, and to the store's own reads and writes of the same sizes."""

from __future__ import annotations

import mmap
import os
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


def measure(folder: Path, slab_bytes: int, num_slabs: int, rounds: int, *, small_pages: bool = False) -> Rates:
    """Return bytes per second of each way, a figure for each round; ways take turns.

    Args:
        small_pages: also the plain loop from ordinary memory.
    """
    found: Rates = defaultdict(list)
    options = Disk(folder=str(folder / "rates"))
    place = Folder(options)
    requests = Requests(options.requests)
    tier = DiskTier("weights", place, requests, options)
    slabs = [tier.allocate(slab_bytes) for _ in range(num_slabs)]
    room = HostSlab(slabs[0].room_bytes, pin=False).bytes.fill_(1)
    plain = folder / "plain.bytes"
    descriptor = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(descriptor, 0, slabs[0].room_bytes * num_slabs)
    for number in range(rounds + 1):  # the first writes to fresh blocks, and is left out
        plainly = partial(_plainly, descriptor=descriptor, size=slabs[0].room_bytes, count=num_slabs)
        took = {
            "plain_write": _seconds(partial(plainly, os.pwritev)),
            "store_write": _seconds(lambda: [slab.store(room) for slab in slabs]),
            "plain_read": _seconds(partial(plainly, os.preadv)),
            "store_read": _seconds(lambda: [slab.fetch(room) for slab in slabs]),
        }
        if small_pages:
            took["small_pages_write"] = _seconds(partial(plainly, os.pwritev, has_large_pages=False))
            took["small_pages_read"] = _seconds(partial(plainly, os.preadv, has_large_pages=False))
        for name, seconds in took.items() if number else ():
            found[name].append(slabs[0].room_bytes * num_slabs / seconds)
    os.close(descriptor)
    plain.unlink()
    tier.close()
    requests.close()
    place.close()
    return found


def _plainly(
    call: Callable[[int, list[mmap.mmap], int], int],
    *,
    descriptor: int,
    size: int,
    count: int,
    has_large_pages: bool = True,
) -> None:
    """One request after the other, each as large as a unit."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if has_large_pages else mmap.MADV_NOHUGEPAGE)
    memory.write(bytes(size))
    for number in range(count):
        if call(descriptor, [memory], number * size) != size:
            raise OSError("a request came back short")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
