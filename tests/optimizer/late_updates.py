"""Updates as late as can be: a part of a step runs only when somebody waits for it. No thread, no sleep, no chance."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.host_lane import HostEvent, HostLane
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.optimizer import DeviceUpdates, UpdateStage
from lightning_superpipe.optimizer.device import Ending

__all__ = ["LateLane", "LateStage"]


class LateLane(HostLane):
    """Runs its jobs in order, up to the one that is waited for, in the thread that waits.

    Attributes:
        num_run: jobs that are done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._late: deque[tuple[Callable[[], None], Event, HostEvent]] = deque()
        self.num_run = 0
        self._running = threading.RLock()  # one job at a time, as in the thread

    def submit(self, job: Callable[[], None], *, after: Event, done: HostEvent | None = None) -> HostEvent:
        done = done or HostEvent()
        self._late.append((job, after, done))
        for event in (done, done.kernels) if isinstance(done, Ending) else (done,):
            event.synchronize = partial(self._wait, done, event.synchronize)  # type: ignore[method-assign]
        return done

    def _wait(self, wanted: HostEvent, waits: Callable[[], None]) -> None:
        self.run_until(wanted)
        waits()

    def run_until(self, wanted: HostEvent) -> None:
        """Run jobs until one is done."""
        with self._running:
            while not wanted.query() and self._late:
                job, after, done = self._late.popleft()
                try:
                    after.synchronize()
                    job()
                except BaseException as error:
                    done.error = error
                self.num_run += 1
                done.set()

    @property
    def num_waiting(self) -> int:
        """Jobs that nobody has waited for yet."""
        return len(self._late)


class LateStage(UpdateStage):
    """An update stage whose parts run when somebody waits for them."""

    def __init__(self, engine: Engine, device: DeviceUpdates | None = None) -> None:
        super().__init__(engine, device=device)
        self.lane = self._lane = LateLane()
        if device is not None:
            device._lanes = [LateLane() for _ in device._lanes]
