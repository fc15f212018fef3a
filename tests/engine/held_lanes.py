"""Copy threads whose copies of one direction start only when the program really waits for them."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lightning_superpipe.config import Link
from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.lanes import Copy, Event, Label
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe.trace import Lane

__all__ = ["HeldLanes"]

_PATIENCE_S = 60


class _HeldEvent:
    """The end of a held copy; the program's own thread lets copies run by waiting for it."""

    def __init__(self, lanes: HeldLanes, inner: Event) -> None:
        self._lanes, self._inner = lanes, inner

    def query(self) -> bool:
        return self._inner.query()

    def synchronize(self) -> None:
        is_program = threading.current_thread() is threading.main_thread()
        with self._lanes.opened() if is_program else contextlib.nullcontext():
            self._inner.synchronize()


class HeldLanes(ThreadLanes):
    """As late as copies can be: a program that does not wait goes on without them."""

    def __init__(self, device: torch.device, held: Lane) -> None:
        super().__init__(device, Link())
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
        """Let held gradients land while the program waits for them."""
        wait = gradients._host.wait

        def waiting(until: Callable[[], bool] | None = None) -> None:
            with self.opened() if self._held is Lane.D2H else contextlib.nullcontext():
                wait(until)

        gradients._host.wait = waiting  # type: ignore[method-assign]

    def close(self) -> None:
        self._gate.set()
        super().close()

    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        done = super()._queue(lane, copies, after, label)
        return _HeldEvent(self, done) if lane is self._held else done

    def _run(self, lane: Lane, job: Any, rng: random.Random) -> None:
        if lane is self._held:
            assert self._gate.wait(_PATIENCE_S), "nobody waits for the copy"
        super()._run(lane, job, rng)
