"""Where parts of steps work on bytes from files: memory used in turns, and which part comes next."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
from typing import Generic, TypeVar

from lightning_superpipe.engine.fetching import Place
from lightning_superpipe.tiers import Tier

__all__ = ["Ranked", "WorkMemory"]

T = TypeVar("T")


class WorkMemory:
    """A few places, each taken by one part at a time.

    Args:
        tier: gives the memory.
        num_places: made as they are needed.
    """

    def __init__(self, tier: Tier, num_places: int) -> None:
        self._tier, self._num_places = tier, num_places
        self._num_made = self._room_bytes = 0
        self._free: queue.SimpleQueue[Place] = queue.SimpleQueue()

    def grow(self, room_bytes: int) -> None:
        """A part that needs so many bytes is about to wait for a place; called by the thread that allocates."""
        if room_bytes > self._room_bytes:  # those in use are dropped when they come back
            self._room_bytes, self._num_made = room_bytes, 0
            self._drop_free()
        if self._num_made < self._num_places:
            self._num_made += 1
            self._free.put(Place(self._tier.allocate(self._room_bytes)))

    def take(self) -> Place:
        """Return the place that has been free for longest; blocks until there is one."""
        while (place := self._free.get()).slab.num_bytes < self._room_bytes:
            place.slab.close()
        place.begin_turn()
        return place

    def give_back(self, place: Place) -> None:
        """Let another part have the place."""
        if place.slab.num_bytes < self._room_bytes:
            place.slab.close()
        else:
            self._free.put(place)

    def close(self) -> None:
        """Drop the memory; nobody works any more."""
        self._drop_free()
        self._num_made = self._room_bytes = 0

    def _drop_free(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait().slab.close()


class Ranked(Generic[T]):
    """What waits, lowest rank first; of equal ranks what came first.

    >>> waiting = Ranked[str]()
    >>> for rank, name in (((0, 2), "c"), ((0, 1), "b"), ((1, 0), "d"), ((0, 1), "B")):
    ...     waiting.push(rank, name)
    >>> [waiting.pop() for _ in range(4)]
    ['b', 'B', 'c', 'd']
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int, T]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def push(self, rank: tuple[int, int], entry: T) -> None:
        """Let something wait."""
        with self._lock:
            heapq.heappush(self._heap, (rank, next(self._numbers), entry))

    def pop(self) -> T:
        """Return what comes next.

        Raises:
            IndexError: nothing waits.
        """
        with self._lock:
            return heapq.heappop(self._heap)[-1]
