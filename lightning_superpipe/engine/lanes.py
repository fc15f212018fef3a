"""Lanes: queues of copies beside compute, and the events that order them.

Four lanes serve a step: compute (the caller's own stream or thread), h2d and d2h (copies), host (work on host tensors
once a copy has landed). :class:`StreamLanes` is the implementation for accelerators, over torch's generic stream API;
:mod:`lightning_superpipe.engine.thread_lanes` has the one for machines without.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superpipe.observe.trace import Lane, Recorder

__all__ = ["Copy", "Event", "HostLane", "Label", "Lanes", "StreamLanes"]


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
        shares_memory: device and host memory are one, with no link between them: what comes home is there already.
    """

    shares_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorder: Recorder | None = None
        self.h2d_bytes = 0
        self.d2h_bytes = 0

    def h2d(self, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        """Queue host-to-device copies that start once every event of ``after`` has passed; return their end."""
        self.h2d_bytes += sum(copy.source.nbytes for copy in copies)
        return self._queue(Lane.H2D, copies, after, label)

    def d2h(self, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        """Queue device-to-host copies; as :meth:`h2d`."""
        self.d2h_bytes += sum(copy.source.nbytes for copy in copies)
        return self._queue(Lane.D2H, copies, after, label)

    def hand_over(self, num_bytes: int, *, label: Label) -> None:
        """Count bytes that came home without a copy, because they share memory with the host."""
        self.d2h_bytes += num_bytes
        if self.recorder is not None:
            self.recorder.span(Lane.D2H, label.name, label.unit, now(), now(), num_bytes)

    @abstractmethod
    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        """Queue copies on one lane."""

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


class _DeviceSpan(NamedTuple):
    """A span whose ends are device events; read once both have passed."""

    lane: Lane
    name: str
    unit: int
    start: torch.Event
    end: torch.Event
    num_bytes: int


class StreamLanes(Lanes):
    """One stream per copy lane on an accelerator (CUDA, ROCm, XPU, or any backend with torch's stream API)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = {lane: torch.Stream(device) for lane in (Lane.H2D, Lane.D2H)}
        self._stalls: deque[tuple[torch.Event, torch.Event]] = deque()
        self._stall_seconds = 0.0
        self._spans: list[_DeviceSpan] = []
        self._origin: tuple[torch.Event, float] | None = None

    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        stream = self._streams[lane]
        with stream:
            for event in after:
                if isinstance(event, torch.Event):
                    stream.wait_event(event)
            start = self._timed(stream) if self.recorder is not None else None
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            done = self._timed(stream) if start is not None else stream.record_event(torch.Event(self.device))
        if start is not None:
            num_bytes = sum(copy.source.nbytes for copy in copies)
            self._spans.append(_DeviceSpan(lane, label.name, label.unit, start, done, num_bytes))
        return done

    def _timed(self, stream: torch.Stream) -> torch.Event:
        return stream.record_event(torch.Event(self.device, enable_timing=True))

    def _compute(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def compute_event(self) -> Event:
        return self._compute().record_event(torch.Event(self.device))

    def compute_waits(self, event: Event, unit: int) -> None:
        if event.query() or not isinstance(event, torch.Event):
            return
        stream = self._compute()
        before = self._timed(stream)
        stream.wait_event(event)
        after = self._timed(stream)
        self._stalls.append((before, after))
        if self.recorder is not None:
            self._spans.append(_DeviceSpan(Lane.COMPUTE, "stall", unit, before, after, 0))

    def mark(self) -> Mark:
        return self._timed(self._compute())

    def compute_span(self, name: str, unit: int, start: Mark) -> None:
        if self.recorder is not None and isinstance(start, torch.Event):
            self._spans.append(_DeviceSpan(Lane.COMPUTE, name, unit, start, self._timed(self._compute()), 0))

    def start_recording(self) -> None:
        self.recorder = Recorder()
        origin = self._timed(self._compute())
        origin.synchronize()
        self._origin = (origin, now())

    def stop_recording(self) -> Recorder:
        recorder, self.recorder = self.recorder, None
        assert recorder is not None and self._origin is not None, "stop_recording() without start_recording()"
        event, seconds = self._origin
        for span in self._spans:
            span.end.synchronize()
            start_s, end_s = (seconds + event.elapsed_time(at) / 1e3 for at in (span.start, span.end))
            recorder.span(span.lane, span.name, span.unit, start_s, end_s, span.num_bytes)
        self._spans.clear()
        return recorder

    @property
    def stall_seconds(self) -> float:
        # Only pairs that have passed are read: asking for the figure must not block the device.
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self._stall_seconds += before.elapsed_time(after) / 1e3
        return self._stall_seconds

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class HostLane:
    """One thread that works on host tensors in order, each job once its copy has landed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._num_open = 0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None], *, after: Event) -> None:
        """Run ``job`` on the lane after the event; jobs run in the order of submission."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="superpipe-host", daemon=True)
            self._thread.start()
        with self._done:
            self._num_open += 1
        self._jobs.put((after, job))

    def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Block until all jobs are done, or until the condition holds; raise what a job raised."""
        with self._done:
            self._done.wait_for(lambda: self._num_open == 0 or (until is not None and until()))
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish all jobs and end the thread; what a job raised is dropped with it."""
        with self._done:
            self._done.wait_for(lambda: self._num_open == 0)
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            after, job = item
            try:
                after.synchronize()
                job()
            except BaseException as error:  # reaches the caller through wait()
                self._error = self._error or error
            del item, after, job  # a waiting thread keeps nothing alive
            with self._done:
                self._num_open -= 1
                self._done.notify_all()


def now() -> float:
    """Seconds on the clock of all recorded host times."""
    return time.perf_counter()
