"""Copy threads whose copies of one direction start only when the program really waits for them."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe.trace import Lane

__all__ = ["HeldLanes"]

_PATIENCE_S = 60


class HeldLanes(ThreadLanes):
    """As late as copies can be: a program that does not wait goes on without them."""

    def __init__(self, device: torch.device, held: Lane) -> None:
        super().__init__(device, None)
        self._held = held
        self._gate = threading.Event()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Scope in which held copies run."""
        self._gate.set()
        try:
            yield
        finally:
            self._gate.clear()

    def attend(self, gradients: GradientReturn) -> None:
        """Let gradients land while the program waits for them."""
        wait = gradients._host.wait

        def waiting(until: Callable[[], bool] | None = None) -> None:
            with self.opened():
                wait(until)

        gradients._host.wait = waiting  # type: ignore[method-assign]

    def compute_waits(self, event: Event, unit: int) -> None:
        with self.opened():
            super().compute_waits(event, unit)

    def close(self) -> None:
        self._gate.set()
        super().close()

    def _run(self, lane: Lane, job: Any, rng: random.Random) -> None:
        if lane is self._held:
            assert self._gate.wait(_PATIENCE_S), "nobody waits for the copy"
        super()._run(lane, job, rng)
