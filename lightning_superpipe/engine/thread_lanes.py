"""Copy lanes for machines without an accelerator: one thread per direction, with an optional emulated link."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_superpipe.config import Link
from lightning_superpipe.engine.host_lane import HostEvent, Past
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes, Mark, now
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane, Recorder

__all__ = ["ThreadLanes"]


class _Job(NamedTuple):
    copies: Sequence[Copy]
    after: Sequence[Event]
    label: Label
    done: HostEvent


class _Link:
    """One direction of the emulated link: whoever copies gets it one after the other."""

    def __init__(self, lane: Lane, link: Link) -> None:
        self._bandwidth = link.h2d_gb_s if lane is Lane.H2D else link.d2h_gb_s
        self._latency_s = link.latency_ms / 1e3
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, num_bytes: int) -> tuple[float, float]:
        """Return when a copy begins and when it ends; the end is absolute: the real copy is part of the emulated."""
        seconds = self._latency_s + (num_bytes / (self._bandwidth * 1e9) if self._bandwidth else 0.0)
        with self._lock:
            start = max(now(), self._free_at)
            self._free_at = start + seconds
        return start, start + seconds


class ThreadLanes(Lanes):
    """Copies by two threads. Compute is synchronous here, so its events have always passed.

    Args:
        device: the CPU, or a device whose kernels run synchronously.
        link: emulated bandwidth and latency; None copies at memory speed.
        max_delay_ms: each copy starts up to this much later, at random: a missing fence then shows as wrong numbers.
        seed: of those delays.
    """

    def __init__(self, device: torch.device, link: Link | None, *, max_delay_ms: float = 0.0, seed: int = 0) -> None:
        super().__init__(device)
        self.shares_memory = device.type == "cpu" and link is None and not max_delay_ms
        self._link = link or Link()
        self._max_delay_ms = max_delay_ms
        self._seed = seed
        self._queues: dict[Lane, queue.SimpleQueue[_Job | None]] = {}
        self._threads: list[threading.Thread] = []
        self._last: dict[Lane, HostEvent] = {}
        self._stall_seconds = 0.0
        self._links = {lane: _Link(lane, self._link) for lane in (Lane.H2D, Lane.D2H)}
        self._rng = random.Random(f"{seed} carry")

    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        if lane not in self._queues:
            self._queues[lane] = queue.SimpleQueue()
            thread = threading.Thread(target=self._work, args=(lane,), name=f"superpipe-{lane.value}", daemon=True)
            thread.start()
            self._threads.append(thread)
        done = self._last[lane] = HostEvent()
        self._queues[lane].put(_Job(copies, after, label, done))
        return done

    def compute_event(self) -> Event:
        return Past()

    def compute_waits(self, event: Event, unit: int) -> None:
        if event.query():
            event.synchronize()  # does not block; raises what the copy raised
            return
        start = now()
        event.synchronize()
        end = now()
        self._stall_seconds += end - start
        if self.recorder is not None:
            self.recorder.span(Lane.COMPUTE, "stall", unit, start, end)

    def mark(self) -> Mark:
        return now()

    def compute_span(self, name: str, unit: int, start: Mark) -> None:
        if self.recorder is not None and isinstance(start, float):
            self.recorder.span(Lane.COMPUTE, name, unit, start, now())

    def start_recording(self) -> None:
        self.recorder = Recorder()

    def stop_recording(self) -> Recorder:
        for event in self._last.values():  # copies still queued belong to the recording
            with contextlib.suppress(TransferError):  # whoever waits for a copy that failed is told
                event.synchronize()
        recorder, self.recorder = self.recorder, None
        assert recorder is not None, "stop_recording() without start_recording()"
        return recorder

    @property
    def stall_seconds(self) -> float:
        return self._stall_seconds

    def close(self) -> None:
        for jobs in self._queues.values():
            jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._queues.clear()
        self._threads.clear()

    def _work(self, lane: Lane) -> None:
        jobs, rng = self._queues[lane], random.Random(f"{self._seed} {lane.value}")
        while (job := jobs.get()) is not None:
            done = job.done
            try:
                self._run(lane, job, rng)
            except BaseException as error:  # the copy's event carries it to whoever waits
                done.error = TransferError(f"copy {job.label.name} of unit {job.label.unit_name!r} failed: {error}")
                done.error.__cause__ = error
            del job  # a waiting thread keeps no tensor alive
            done.set()

    def _run(self, lane: Lane, job: _Job, rng: random.Random) -> None:
        for event in job.after:
            event.synchronize()
        self._move(lane, job.copies, job.label, rng)

    def _carry(self, lane: Lane, copies: Sequence[Copy], label: Label) -> None:
        self._move(lane, copies, label, self._rng)

    def _move(self, lane: Lane, copies: Sequence[Copy], label: Label, rng: random.Random) -> None:
        if self._max_delay_ms:
            time.sleep(rng.random() * self._max_delay_ms / 1e3)
        num_bytes = sum(copy.source.nbytes for copy in copies)
        start, deadline = self._links[lane].reserve(num_bytes)
        for target, source in copies:
            _copy(target, source)
        time.sleep(max(0.0, deadline - now()))
        if self.recorder is not None:
            self.recorder.span(lane, label.name, label.unit, start, now(), num_bytes)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy with one thread: torch's own copy would take the cores from compute."""
    on_host = target.device.type == source.device.type == "cpu"
    if on_host and target.is_contiguous() and source.is_contiguous():
        _bytes(target)[...] = _bytes(source)
    else:
        with torch.no_grad():
            target.copy_(source)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
