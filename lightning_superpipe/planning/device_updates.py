"""Updates on the device, as a simulation sees them: copies there, kernels, copies home, in threads that take turns.

The copies go past what is queued for the link (:mod:`lightning_superpipe.optimizer.device`), so they are handed to it
when their own time has come, not when the update is asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_superpipe.planning.link import Copying, Link

__all__ = ["DeviceUpdate", "DeviceUpdates"]

_NUM_THREADS = 2


@dataclass(eq=False)
class DeviceUpdate:
    """One unit's update.

    Attributes:
        unit: its index.
        ready_s: its gradients are final.
        there_bytes, home_bytes: copied to the device and back.
        kernel_s: on the device.
        kernels_end_s: when its kernels have run; NaN as long as nobody knows. Its slot holds the new weights from then.
        end_s: when its weights are home; NaN likewise.
    """

    unit: int
    ready_s: float
    there_bytes: int
    home_bytes: int
    kernel_s: float
    kernels_end_s: float = math.nan
    end_s: float = math.nan
    _copying: Copying | None = field(default=None, repr=False)


class DeviceUpdates:
    """The threads that run them, each one update after the other.

    Args:
        link: what their copies go over.
        count: told the bytes of each pair of copies, there and home.

    Attributes:
        kernel_s: of kernels since :meth:`take_kernel_s`.

    >>> from lightning_superpipe.planning.workload import Curve, Speeds
    >>> updates = DeviceUpdates(Link(Speeds(Curve.steady(10.0), Curve.steady(10.0))), lambda there, home: None)
    >>> first = updates.submit(DeviceUpdate(0, ready_s=1.0, there_bytes=30, home_bytes=20, kernel_s=0.5))
    >>> updates.finish(first)
    >>> first.kernels_end_s, first.end_s
    (4.5, 6.5)
    """

    def __init__(self, link: Link, count: Callable[[int, int], None]) -> None:
        self._link, self._count = link, count
        self._threads: list[deque[DeviceUpdate]] = [deque() for _ in range(_NUM_THREADS)]
        self._free_s = [0.0] * _NUM_THREADS
        self._num_submitted = 0
        self._kernels_free_s = self.kernel_s = 0.0

    def submit(self, update: DeviceUpdate) -> DeviceUpdate:
        """Queue an update for the thread whose turn it is; return it."""
        self._threads[self._num_submitted % _NUM_THREADS].append(update)
        self._num_submitted += 1
        return update

    def advance(self, until_s: float) -> None:
        """Do what begins up to some time, so that a copy handed to the link then comes behind it."""
        while any(self._threads) and any([self._step(number, until_s) for number in range(_NUM_THREADS)]):
            pass

    def finish(self, update: DeviceUpdate, *, kernels_only: bool = False) -> None:
        """Go on until an update is over, or its kernels are."""
        while math.isnan(update.kernels_end_s if kernels_only else update.end_s):
            number = next(number for number, thread in enumerate(self._threads) if update in thread)
            first = self._threads[number][0]
            if first._copying is None:
                self.advance(max(self._free_s[number], first.ready_s))
            else:
                self.advance(self._link.end_s(first._copying))

    def take_kernel_s(self) -> float:
        """Return the seconds of kernels since the last call: compute does nothing else meanwhile."""
        seconds, self.kernel_s = self.kernel_s, 0.0
        return seconds

    def _step(self, number: int, until_s: float) -> bool:
        """Let one thread do its next thing, if that begins in time."""
        if not self._threads[number]:
            return False
        update, link = self._threads[number][0], self._link
        if update._copying is None:
            start_s = max(self._free_s[number], update.ready_s)
            if start_s > until_s:
                return False
            update._copying = link.copy(link.h2d, update.there_bytes, start_s)
            return True
        if not link.is_over(update._copying, until_s):
            return False
        if math.isnan(update.kernels_end_s):
            start_s = max(update._copying.end_s, self._kernels_free_s)
            self._kernels_free_s = update.kernels_end_s = start_s + update.kernel_s
            self.kernel_s += update.kernel_s
            update._copying = link.copy(link.d2h, update.home_bytes, update.kernels_end_s)
            self._count(update.there_bytes, update.home_bytes)
            return True
        self._free_s[number] = update.end_s = update._copying.end_s
        self._threads[number].popleft()
        return True
