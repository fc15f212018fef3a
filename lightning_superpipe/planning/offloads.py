"""Offloaded activations of one step, as a simulation sees them: on their way home, on the host, on their way back.

A batch is sent when the next forward begins, and the device's memory is let go at the beginning of a forward behind
that. In backward batches return, one ahead of need. What is still on its way home when backward goes through its unit
has never left: nothing of it can be used again before the copy is over, needed or not
(:mod:`lightning_superpipe.engine.offload`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lightning_superpipe.planning.link import Copying, Link

__all__ = ["Offloads"]


class Offloads:
    """What becomes of the batches of a step.

    Args:
        sizes: bytes of each unit's batch; 0 where nothing travels.
        home: hands a copy home over, now.
        there: hands a copy to the device over, now.

    Attributes:
        away_bytes: of what was saved, those that are on the host only.

    >>> from lightning_superpipe.planning.workload import Curve, Speeds
    >>> link = Link(Speeds(Curve.steady(10.0), Curve.steady(10.0)))
    >>> offloads = Offloads([10, 10, 10], link, lambda size: link.copy(link.d2h, size, 1.0), lambda size: None)
    >>> offloads.note_saved(0)
    >>> offloads.send()
    >>> offloads.is_late(0, 1.5), offloads.late_bytes(1.5), offloads.late_bytes(2.0)
    (True, 0, 0)
    >>> offloads.note_used(0)
    >>> offloads.late_bytes(1.5), offloads.late_bytes(2.0)
    (10, 0)
    """

    def __init__(
        self, sizes: Sequence[int], link: Link, home: Callable[[int], Copying], there: Callable[[int], Copying]
    ) -> None:
        self._sizes, self._link, self._home, self._there = sizes, link, home, there
        self._unsent = -1
        self._sent: deque[tuple[int, Copying]] = deque()
        self._away: set[int] = set()
        self._returning: dict[int, Copying] = {}
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
            self._sent.append((self._unsent, self._home(self._sizes[self._unsent])))
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
                self._returning[each] = self._there(self._sizes[each])

    def arrival(self, index: int) -> Copying | None:
        """What a backward has to wait for, once."""
        return self._returning.pop(index, None)

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
