"""Offloaded activations on their way to files and back, as a simulation sees them: one hop more than to host memory.

A few buffers lie between device and file (:mod:`lightning_superpipe.engine.file_hop`). A copy home waits until one of
them has been written, a read for a buffer and for its own write, and the copy to the device for the read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lightning_superpipe.planning.disk_queue import DiskMove, DiskQueue
from lightning_superpipe.planning.link import Copying, Link
from lightning_superpipe.planning.need import ACTIVATION_BUFFERS

__all__ = ["FileRoute"]


class _Batch:
    """One batch on its way: its copy home, its write, and its copy to the device, as far as they were handed over."""

    __slots__ = ("back", "home", "num_bytes", "written")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.home: Copying | None = None
        self.written: DiskMove | None = None
        self.back: Copying | None = None


class FileRoute:
    """The way of batches through buffers to files, over all steps.

    Args:
        sizes: bytes of each unit's batch.
        home: hands a copy home over, of so many bytes, that does not begin before some time.
        there: likewise to the device.

    >>> from lightning_superpipe.planning.workload import Curve, Speeds
    >>> fast, slow = Curve.steady(10.0), Curve.steady(5.0)
    >>> speeds = Speeds(fast, fast, disk_read=slow, disk_write=slow)
    >>> link, disk = Link(speeds), DiskQueue(speeds, 3)
    >>> route = FileRoute(
    ...     [10] * 5, disk, link, lambda *job: link.copy(link.d2h, *job), lambda *job: link.copy(link.h2d, *job)
    ... )
    >>> [link.end_s(route.send(index)) for index in range(5)]  # all but three wait for a buffer to be written
    [1.0, 2.0, 3.0, 4.0, 6.0]
    >>> route.note(6.0)
    >>> route.fetch(0, 6.0)
    >>> link.end_s(route.arrive(0))  # read while the fourth one is written, and copied
    12.0
    """

    def __init__(
        self,
        sizes: Sequence[int],
        disk: DiskQueue,
        link: Link,
        home: Callable[[int, float], Copying],
        there: Callable[[int, float], Copying],
    ) -> None:
        self._sizes, self._disk, self._link, self._home, self._there = sizes, disk, link, home, there
        self._batches: dict[int, _Batch] = {}
        self._unwritten: deque[_Batch] = deque()
        self._buffers: deque[Callable[[], float]] = deque()  # when each is free, the oldest user's first

    def note(self, now_s: float) -> None:
        """Time has gone on: write what has landed."""
        while self._unwritten and self._link.is_over(_known(self._unwritten[0].home), now_s):
            self._write(self._unwritten[0])

    def _write(self, batch: _Batch) -> DiskMove:
        while batch.written is None:
            first = self._unwritten.popleft()
            first.written = self._disk.write(self._link.end_s(_known(first.home)), first.num_bytes)
        return batch.written

    def _take_buffer(self, free_s: Callable[[], float]) -> float:
        """Return when a buffer is free; ``free_s`` tells when it will be so again."""
        self._buffers.append(free_s)
        return self._buffers.popleft()() if len(self._buffers) > ACTIVATION_BUFFERS else 0.0

    def send(self, index: int) -> Copying:
        batch = self._batches[index] = _Batch(self._sizes[index])
        free_s = self._take_buffer(lambda: self._disk.end_s(self._write(batch)))
        batch.home = self._home(batch.num_bytes, free_s)
        self._unwritten.append(batch)
        return batch.home

    def fetch(self, index: int, now_s: float) -> None:
        batch = self._batches[index]
        free_s = self._take_buffer(lambda: self._link.end_s(_known(batch.back)))
        read = self._disk.read(max(now_s, free_s), batch.num_bytes, behind=self._write(batch))
        batch.back = self._there(batch.num_bytes, self._disk.end_s(read))

    def arrive(self, index: int) -> Copying:
        return _known(self._batches[index].back)


def _known(copying: Copying | None) -> Copying:
    assert copying is not None, "it was handed over before"
    return copying
