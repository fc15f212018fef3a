"""Copy lanes of an accelerator: one stream per direction, over torch's generic stream API."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lightning_superpipe.engine.host_lane import HostEvent, HostLane
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes, Mark, now
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane, Recorder

__all__ = ["StreamLanes"]


class _DeviceSpan(NamedTuple):
    """A span whose ends are device events; read once both have passed."""

    lane: Lane
    name: str
    unit: int
    start: torch.Event
    end: torch.Event
    num_bytes: int


class _LateCopy:
    """The end of a copy that waits for work on the host before it can be put into its stream."""

    def __init__(self) -> None:
        self.issued: HostEvent | None = None
        self.done: torch.Event | None = None

    def query(self) -> bool:
        return self.done is not None and self.done.query()

    def synchronize(self) -> None:
        self.on_device().synchronize()

    def on_device(self) -> torch.Event:
        """Block until the copy is in its stream; return its end there. Raises what the work on the host raised."""
        assert self.issued is not None, "whoever makes a late copy submits it"
        self.issued.synchronize()
        assert self.done is not None, "it was put into the stream"
        return self.done


class _All(NamedTuple):
    """Several events as one."""

    events: Sequence[Event]

    def query(self) -> bool:
        return all(event.query() for event in self.events)

    def synchronize(self) -> None:
        for event in self.events:
            event.synchronize()


class StreamLanes(Lanes):
    """One stream per copy lane on an accelerator (CUDA, ROCm, XPU, or any backend with torch's stream API).

    A stream cannot wait for a thread. A copy behind work on the host (an optimizer's update) is therefore put into its
    stream by a thread once that work is done, and so are the copies behind it in the same lane.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = {lane: torch.Stream(device) for lane in (Lane.H2D, Lane.D2H)}
        self._besides = {lane: torch.Stream(device) for lane in (Lane.COMPUTE, Lane.H2D, Lane.D2H)}
        self._issuers = {lane: HostLane(f"superpipe-{lane.value}") for lane in (Lane.H2D, Lane.D2H)}
        self._stalls: deque[tuple[torch.Event, torch.Event]] = deque()
        self._stall_seconds = 0.0
        self._spans: list[_DeviceSpan] = []
        self._origin: tuple[torch.Event, float] | None = None

    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        waits = [event for event in after if not isinstance(event, torch.Event) and not event.query()]
        issuer = self._issuers[lane]
        if not waits and issuer.is_idle:
            return self._issue(lane, copies, after, label)
        late = _LateCopy()

        def issue() -> None:
            with torch.no_grad():
                late.done = self._issue(lane, copies, after, label)

        late.issued = issuer.submit(issue, after=_All(waits))
        return late

    def _issue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> torch.Event:
        """Put copies into a lane's stream."""
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

    def _carry(self, lane: Lane, copies: Sequence[Copy], label: Label) -> None:
        start, stream = now(), self._besides[lane]
        with stream:
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            stream.record_event(torch.Event(self.device)).synchronize()
        if self.recorder is not None:
            num_bytes = sum(copy.source.nbytes for copy in copies)
            self.recorder.span(lane, label.name, label.unit, start, now(), num_bytes)

    def run_beside(self, work: Callable[[], None]) -> None:
        stream = self._besides[Lane.COMPUTE]
        with stream:
            work()
            stream.record_event(torch.Event(self.device)).synchronize()

    def _timed(self, stream: torch.Stream) -> torch.Event:
        return stream.record_event(torch.Event(self.device, enable_timing=True))

    def _compute(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def compute_event(self) -> Event:
        return self._compute().record_event(torch.Event(self.device))

    def compute_waits(self, event: Event, unit: int) -> None:
        if event.query() or not isinstance(event, torch.Event | _LateCopy):
            event.synchronize()  # the end of an update in the slot: it has to be told by a thread
            return
        stream = self._compute()
        before = self._timed(stream)
        stream.wait_event(event.on_device() if isinstance(event, _LateCopy) else event)
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
        for issuer in self._issuers.values():  # copies still to be issued belong to the recording
            with contextlib.suppress(TransferError):  # whoever waits for a copy that failed is told
                issuer.wait()
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
        for issuer in self._issuers.values():
            issuer.close()
        for stream in (*self._streams.values(), *self._besides.values()):
            stream.synchronize()
