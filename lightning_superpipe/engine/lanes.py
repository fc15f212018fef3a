"""Lanes: queues of copies beside compute, and the events that order them.

Four lanes serve a step: compute (the caller's own stream or thread), h2d and d2h (copies), host (work on host tensors
once a copy has landed). :mod:`lightning_superpipe.engine.stream_lanes` is the implementation for accelerators, over
torch's generic stream API; :mod:`lightning_superpipe.engine.thread_lanes` is the one for machines without.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superpipe.observe.trace import Lane, Recorder

__all__ = ["Copy", "Event", "Label", "Lanes", "Mark", "now"]


class Event(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Block the calling thread until it is."""


Mark = Event | float


class Copy(NamedTuple):
    """Bytes to move: equal sizes and dtypes, one side on the host."""

    target: Tensor
    source: Tensor


class Label(NamedTuple):
    """What a copy is, for the recorder and for errors: ``Label("P", 3, "net.h.3")``."""

    name: str
    unit: int
    unit_name: str


class Lanes(ABC):
    """The copy lanes of one device. Calls never block, except :meth:`compute_waits` where compute runs on the host.

    Attributes:
        shares_memory: device and host memory are one, with no link between them: what moves may be there already.
    """

    shares_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorder: Recorder | None = None
        self.h2d_bytes = 0
        self.d2h_bytes = 0
        self._counting = threading.Lock()

    def h2d(self, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        """Queue host-to-device copies that start once every event of ``after`` has passed; return their end."""
        self._count(Lane.H2D, copies)
        return self._queue(Lane.H2D, copies, after, label)

    def d2h(self, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        """Queue device-to-host copies; as :meth:`h2d`."""
        self._count(Lane.D2H, copies)
        return self._queue(Lane.D2H, copies, after, label)

    def carry(self, lane: Lane, copies: Sequence[Copy], *, label: Label) -> None:
        """Copy in the calling thread, over the same link but past what is queued; return when it is done.

        For threads that work beside compute: queued copies may be waiting for them.
        """
        self._count(lane, copies)
        self._carry(lane, copies, label)

    def run_beside(self, work: Callable[[], None]) -> None:
        """Run kernels for the calling thread, beside compute; return when they are done."""
        work()

    def _count(self, lane: Lane, copies: Sequence[Copy]) -> None:
        self._count_bytes(lane, sum(copy.source.nbytes for copy in copies))

    def _count_bytes(self, lane: Lane, num_bytes: int) -> None:
        with self._counting:
            if lane is Lane.H2D:
                self.h2d_bytes += num_bytes
            else:
                self.d2h_bytes += num_bytes

    def hand_over(self, lane: Lane, num_bytes: int, *, label: Label) -> None:
        """Count bytes that went to the device or came home without a copy, because the two share memory."""
        self._count_bytes(lane, num_bytes)
        if self.recorder is not None:
            self.recorder.span(lane, label.name, label.unit, now(), now(), num_bytes)

    @abstractmethod
    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        """Queue copies on one lane."""

    def _carry(self, lane: Lane, copies: Sequence[Copy], label: Label) -> None:
        """Copy in the calling thread."""
        with torch.no_grad():
            for target, source in copies:
                target.copy_(source)

    @abstractmethod
    def compute_event(self) -> Event:
        """An event after all compute that the calling thread has issued so far."""

    @abstractmethod
    def compute_waits(self, event: Event, unit: int) -> None:
        """Let compute issued from now on start only after ``event``; the waiting time counts as a stall."""

    @abstractmethod
    def mark(self) -> Mark:
        """A moment on the compute lane, to be given to :meth:`compute_span`; taken only while recording."""

    @abstractmethod
    def compute_span(self, name: str, unit: int, start: Mark) -> None:
        """Record compute from a mark until now, if a recorder listens."""

    @abstractmethod
    def start_recording(self) -> None:
        """Record from now on."""

    @abstractmethod
    def stop_recording(self) -> Recorder:
        """Return what was recorded since :meth:`start_recording`, every queued copy of it finished."""

    @property
    @abstractmethod
    def stall_seconds(self) -> float:
        """Time that compute has waited for arrivals so far."""

    @abstractmethod
    def close(self) -> None:
        """Finish queued copies and release threads."""


def now() -> float:
    """Seconds on the clock of all recorded host times."""
    return time.perf_counter()
