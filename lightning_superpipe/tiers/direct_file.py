"""One file that grows by whole regions, read and written past the page cache where the file system allows that."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_superpipe.tiers.requests import Requests

__all__ = ["BLOCK", "DirectFile", "padded"]

BLOCK = 4096
"""Bytes; regions, requests and the memory they use begin and end at multiples: drives and pages ask for it."""

# Bytes of one request: with a few of them under way a drive gives all it has, and each is small beside a unit.
_REQUEST = 4 << 20


def padded(num_bytes: int) -> int:
    """Return the bytes of the region that holds so many.

    >>> padded(1), padded(4096), padded(0)
    (4096, 4096, 0)
    """
    return -(-num_bytes // BLOCK) * BLOCK


class DirectFile:
    """A file made of regions.

    Args:
        path: must not exist.
        requests: runs the requests.
        is_named: keep the name; otherwise the file loses it at once, and the system frees its bytes as soon as nobody
            uses them, however the process ends.

    Attributes:
        is_direct: reads and writes go past the page cache.
        num_read_bytes, num_written_bytes: by requests, and what :meth:`count` was told.
        descriptor: for mappings.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, requests: Requests, *, is_named: bool) -> None:
        self.path, self._requests = path, requests
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        direct = _open_direct(path)
        self.is_direct = direct is not None
        self._io = self.descriptor if direct is None else direct
        if not is_named:
            path.unlink()
        self._is_open = True
        self.size = self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        # Finalizers run on any thread, in the middle of anything: they take no lock, they only queue.
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self.num_read_bytes = self.num_written_bytes = 0

    def missing(self, num_bytes: int) -> int:
        """Return how much larger the file must be to hold so many bytes beside those that regions use."""
        return max(0, self._end + num_bytes - self.size)

    def grow(self, num_bytes: int) -> None:
        """Take so many more bytes of the disk.

        Raises:
            OSError: the disk is full.
        """
        if num_bytes > 0:
            os.posix_fallocate(self.descriptor, self.size, num_bytes)
            self.size += num_bytes

    def region(self, num_bytes: int) -> int:
        """Return the offset of a region of ``padded(num_bytes)`` bytes that nobody else has.

        Raises:
            OSError: the disk is full.
        """
        size = padded(num_bytes)
        with self._lock:
            while self._returned:
                returned, free_size = self._returned.popleft()
                self._free[free_size].append(returned)
            if self._free[size]:
                return self._free[size].pop()
            self.grow(self.missing(size))
            offset, self._end = self._end, self._end + size
            return offset

    def give_back(self, offset: int, num_bytes: int) -> None:
        """Let a region be used again; callable from finalizers."""
        self._returned.append((offset, padded(num_bytes)))

    def read(self, offset: int, target: Tensor) -> None:
        """Fill host memory from the file, several requests at once; blocks.

        Args:
            target: shape (a multiple of BLOCK,), uint8, beginning at a page.

        Raises:
            OSError: a request failed or the file ends too early.
        """
        self._run(_read_all, offset, target)
        self.count(read=target.numel())

    def write(self, offset: int, source: Tensor) -> None:
        """Write host memory to the file; as :meth:`read`."""
        self._run(_write_all, offset, source)
        self.count(written=source.numel())

    def count(self, *, read: int = 0, written: int = 0) -> None:
        """Count bytes that have crossed; from any thread."""
        with self._lock:
            self.num_read_bytes += read
            self.num_written_bytes += written

    def _run(self, request: Callable[[int, memoryview, int], None], offset: int, memory: Tensor) -> None:
        view = memoryview(memory.numpy())  # type: ignore[arg-type]  # arrays are buffers
        starts = range(0, len(view), _REQUEST)
        self._requests.run(
            [partial(request, self._io, view[start : start + _REQUEST], offset + start) for start in starts]
        )
        if not self.is_direct:
            os.posix_fadvise(self._io, offset, len(view), os.POSIX_FADV_DONTNEED)

    def go_through_cache(self) -> None:
        """Leave direct requests alone from now on."""
        os.close(self._io)
        self._io, self.is_direct = self.descriptor, False

    def close(self) -> None:
        """Close the file; mappings stay. Closing twice does no harm."""
        for descriptor in {self._io, self.descriptor} if self._is_open else ():
            os.close(descriptor)
        self._is_open = False


def _open_direct(path: Path) -> int | None:
    """Open a file past the page cache; None where the file system has no such thing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except (AttributeError, OSError):  # other systems; tmpfs and some network file systems
        return None


def _read_all(descriptor: int, memory: memoryview, offset: int) -> None:
    _transfer(os.preadv, descriptor, memory, offset)


def _write_all(descriptor: int, memory: memoryview, offset: int) -> None:
    _transfer(os.pwritev, descriptor, memory, offset)


def _transfer(
    call: Callable[[int, list[memoryview], int], int], descriptor: int, memory: memoryview, offset: int
) -> None:
    done = 0
    while done < len(memory):
        num_bytes = call(descriptor, [memory[done:]], offset + done)
        done += num_bytes
        if num_bytes <= 0 or (done < len(memory) and done % BLOCK):
            raise OSError(errno.EIO, f"only {done} of {len(memory)} bytes at offset {offset} were transferred")
