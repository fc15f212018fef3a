"""Offloaded activations of one step, as a simulation sees them: on their way home, on the host, on their way back.

A batch is sent when the next forward begins, and the device's memory is let go at the beginning of a forward behind
that. In backward batches return, one ahead of need. What is still on its way home when backward goes through its unit
has never left: nothing of it can be used again before the copy is over, needed or not
(:mod:`lightning_superpipe.engine.offload`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_superpipe.planning.link import Copying, Link

__all__ = ["MemoryRoute", "Offloads", "Route"]


class Route(Protocol):
    """The way of batches from the device and back."""

    def send(self, index: int) -> Copying:
        """A unit's batch leaves the device: return its copy home."""

    def fetch(self, index: int, now_s: float) -> None:
        """It will be needed soon."""

    def arrive(self, index: int) -> Copying:
        """It is needed, once: return its copy to the device."""

    def note(self, now_s: float) -> None:
        """A use begins: time has gone on."""


class MemoryRoute:
    """The way to host memory: a copy each way.

    Args:
        sizes: bytes of each unit's batch.
        home, there: hand a copy of so many bytes over.
    """

    def __init__(self, sizes: Sequence[int], home: Callable[[int], Copying], there: Callable[[int], Copying]) -> None:
        self._sizes, self._home, self._there = sizes, home, there
        self._returning: dict[int, Copying] = {}

    def send(self, index: int) -> Copying:
        return self._home(self._sizes[index])

    def fetch(self, index: int, now_s: float) -> None:
        self._returning[index] = self._there(self._sizes[index])

    def arrive(self, index: int) -> Copying:
        return self._returning.pop(index)

    def note(self, now_s: float) -> None:
        pass


class Offloads:
    """What becomes of the batches of a step.

    Args:
        sizes: bytes of each unit's batch; 0 where nothing travels.
        route: that they take.

    Attributes:
        away_bytes: of what was saved, those that are on the host only.

    >>> from lightning_superpipe.planning.workload import Curve, Speeds
    >>> link = Link(Speeds(Curve.steady(10.0), Curve.steady(10.0)))
    >>> sizes = [10, 10, 10]
    >>> route = MemoryRoute(sizes, lambda size: link.copy(link.d2h, size, 1.0), lambda size: None)
    >>> offloads = Offloads(sizes, link, route)
    >>> offloads.note_saved(0)
    >>> offloads.send()
    >>> offloads.is_late(0, 1.5), offloads.late_bytes(1.5), offloads.late_bytes(2.0)
    (True, 0, 0)
    >>> offloads.note_used(0)
    >>> offloads.late_bytes(1.5), offloads.late_bytes(2.0)
    (10, 0)
    """

    def __init__(self, sizes: Sequence[int], link: Link, route: Route) -> None:
        self._sizes, self._link, self._route = sizes, link, route
        self._unsent = -1
        self._sent: deque[tuple[int, Copying]] = deque()
        self._away: set[int] = set()
        self._returning: set[int] = set()
        self._used: list[tuple[int, Copying]] = []
        self.away_bytes = 0

    @property
    def under_way(self) -> list[Copying]:
        """Copies home that nobody has waited for."""
        return [copying for _, copying in self._sent]

    # -- forward

    def note_saved(self, index: int) -> None:
        """A unit's forward is over."""
        if self._sizes[index]:
            self._unsent = index

    def let_go(self, wait: Callable[[Copying], float], now_s: float) -> None:
        """A forward begins: let go of what has landed; of two batches on their way the first is waited for.

        Args:
            wait: waits for a copy, and returns the time.
        """
        while self._sent and (len(self._sent) > 1 or self._link.is_over(self._sent[0][1], now_s)):
            sender, copying = self._sent.popleft()
            now_s = wait(copying)
            self.away_bytes += self._sizes[sender]
            self._away.add(sender)

    def send(self) -> None:
        """Send what the unit before has saved."""
        if self._unsent >= 0:
            self._sent.append((self._unsent, self._route.send(self._unsent)))
            self._unsent = -1

    # -- backward

    def fetch(self, index: int, now_s: float) -> None:
        """Backward reaches a unit: its activations come back, and those of the one before it in forward."""
        if not self._sizes[index]:
            return
        while self._sent and self._link.is_over(self._sent[0][1], now_s):
            self._sent.popleft()  # what is on the device still stays there
        earlier = next((other for other in range(index - 1, -1, -1) if self._sizes[other]), index)
        for each in (index, earlier):
            if each in self._away:
                self._away.discard(each)
                self.away_bytes -= self._sizes[each]
                self._returning.add(each)
                self._route.fetch(each, now_s)

    def arrival(self, index: int) -> Copying | None:
        """What a backward has to wait for, once."""
        if index not in self._returning:
            return None
        self._returning.discard(index)
        return self._route.arrive(index)

    def is_late(self, index: int, now_s: float) -> bool:
        """Whether a unit's batch is on its way home still, so that its backward frees nothing of it."""
        return any(sender == index and not self._link.is_over(copying, now_s) for sender, copying in self._sent)

    def late_share(self, index: int, start_s: float, end_s: float) -> float:
        """Return for which part of a backward that is over now its unit's batch was late."""
        if self.is_late(index, end_s) or end_s <= start_s:
            return 1.0
        ends = [self._link.end_s(copying) for sender, copying in self._sent if sender == index]
        return max(((each - start_s) / (end_s - start_s) for each in ends), default=0.0)

    def note_used(self, index: int) -> None:
        """A unit's backward is over."""
        self._used += [(index, copying) for sender, copying in self._sent if sender == index]

    def late_bytes(self, now_s: float) -> int:
        """Return the bytes of units whose backward is over, and whose batches are late."""
        if not self._used:
            return 0
        self._used = [(index, copying) for index, copying in self._used if not self._link.is_over(copying, now_s)]
        return sum(self._sizes[index] for index, _ in self._used)
