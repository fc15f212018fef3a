"""Two lanes of copies that may disturb each other, as a simulation sees them."""

from __future__ import annotations

import math
from collections import deque

from lightning_superpipe.planning.workload import Curve, Speeds

__all__ = ["Copying", "Link"]


class Copying:
    """One copy: handed to a lane, under way, or over.

    Attributes:
        ready_s: it may not begin before.
        left_s: work that is left, in seconds of a link that is not disturbed.
        shared_rate: how fast it goes while the other way copies as well, 1 = as alone.
        end_s: when it is over; NaN as long as nobody knows.
    """

    __slots__ = ("end_s", "left_s", "ready_s", "shared_rate")

    def __init__(self, ready_s: float, left_s: float, shared_rate: float) -> None:
        self.ready_s, self.left_s, self.shared_rate = ready_s, left_s, shared_rate
        self.end_s = math.nan


class _Way:
    """One direction: copies one after the other, in the order in which they were handed over."""

    def __init__(self, alone: Curve) -> None:
        self.alone = alone
        self.free_s = self.busy_s = 0.0
        self.waiting: deque[Copying] = deque()
        self.known: dict[int, tuple[float, float]] = {}


class Link:
    """Both directions of a link.

    Where they do not disturb each other, the end of a copy is known as soon as it is handed over. Where they do, it
    depends on what the other way will carry: then time is played up to the moment that somebody asks about. Copies
    must be handed over in the order of time, none earlier than the last moment that was asked about.

    Attributes:
        h2d: the way to the device.
        d2h: the way home.

    >>> link = Link(Speeds(Curve.steady(10.0), Curve.steady(10.0), both=Curve.steady(5.0)))
    >>> there, back = link.copy(link.h2d, 10, 0.0), link.copy(link.d2h, 20, 0.5)
    >>> link.end_s(there), link.end_s(back)
    (1.5, 3.0)
    """

    def __init__(self, speeds: Speeds) -> None:
        self._both = speeds.both
        self.h2d, self.d2h = _Way(speeds.h2d), _Way(speeds.d2h)
        self._now_s = 0.0

    def copy(self, way: _Way, num_bytes: int, ready_s: float) -> Copying:
        """Hand a copy over; it begins when all before it on this way are over, not before ``ready_s``."""
        seconds, rate = way.known.get(num_bytes) or self._look_up(way, num_bytes)
        way.busy_s += seconds
        copying = Copying(ready_s, seconds, rate)
        if self._both is None:
            start = way.free_s if way.free_s > ready_s else ready_s
            copying.end_s = way.free_s = start + seconds
        else:
            way.waiting.append(copying)
        return copying

    def _look_up(self, way: _Way, num_bytes: int) -> tuple[float, float]:
        alone_s = way.alone.seconds(num_bytes)
        shared_s = alone_s if self._both is None else self._both.seconds(num_bytes)
        found = way.known[num_bytes] = alone_s, min(1.0, alone_s / shared_s) if shared_s > 0 else 1.0
        return found

    def end_s(self, copying: Copying) -> float:
        """Return when a copy is over."""
        while math.isnan(copying.end_s):
            self._play(math.inf)
        return copying.end_s

    def is_over(self, copying: Copying, at_s: float) -> bool:
        """Whether a copy is over at some time."""
        while self._now_s < at_s and math.isnan(copying.end_s):
            self._play(at_s)
        return copying.end_s <= at_s

    def _play(self, until_s: float) -> None:
        """Go on to the next moment at which a copy begins or ends, but not beyond ``until_s``."""
        now_s, there, back = self._now_s, self.h2d.waiting, self.d2h.waiting
        first = there[0] if there and there[0].ready_s <= now_s else None
        second = back[0] if back and back[0].ready_s <= now_s else None
        next_s = until_s
        if first is None and there and there[0].ready_s < next_s:
            next_s = there[0].ready_s
        if second is None and back and back[0].ready_s < next_s:
            next_s = back[0].ready_s
        is_shared = first is not None and second is not None
        ends_s = [
            math.inf if copying is None else now_s + copying.left_s / (copying.shared_rate if is_shared else 1.0)
            for copying in (first, second)
        ]
        next_s = min(next_s, *ends_s)
        for copying, waiting, end_s in ((first, there, ends_s[0]), (second, back, ends_s[1])):
            if copying is None:
                continue
            if end_s <= next_s:
                copying.left_s, copying.end_s = 0.0, next_s
                waiting.popleft()
            else:
                copying.left_s -= (next_s - now_s) * (copying.shared_rate if is_shared else 1.0)
        self._now_s = next_s
