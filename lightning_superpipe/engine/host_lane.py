"""The host lane: threads of our own that work on host tensors, each job once what it waits for has passed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from lightning_superpipe.engine.lanes import Event

__all__ = ["HostEvent", "HostLane", "Past", "Regardless"]


class HostEvent:
    """The end of a piece of work that a thread of ours does; carries the error that ended it."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self.error: BaseException | None = None

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        self._passed.wait()
        if self.error is not None:
            raise self.error

    def set(self) -> None:
        self._passed.set()


class Past:
    """The event of work that was done before anyone could ask."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class Regardless(NamedTuple):
    """An event without its error: for whoever needs the memory and not the bytes. Who waits for the bytes is told."""

    event: Event

    def query(self) -> bool:
        return self.event.query()

    def synchronize(self) -> None:
        with contextlib.suppress(Exception):
            self.event.synchronize()


class _Job(NamedTuple):
    after: Event
    run: Callable[[], None]
    done: HostEvent


class HostLane:
    """One thread that works on host tensors in order, each job once its copy has landed.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "superpipe-host") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._num_open = 0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None], *, after: Event, done: HostEvent | None = None) -> HostEvent:
        """Run ``job`` on the lane after the event; jobs run in the order of submission. Return its end, ``done``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        with self._done:
            self._num_open += 1
        done = done or HostEvent()
        self._jobs.put(_Job(after, job, done))
        return done

    @property
    def is_idle(self) -> bool:
        """Whether every job is done."""
        return self._num_open == 0

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
        while (job := self._jobs.get()) is not None:
            done = job.done
            try:
                job.after.synchronize()
                job.run()
            except BaseException as error:  # reaches the caller through wait() and through the event
                done.error = error
                self._error = self._error or error
            del job  # a waiting thread keeps nothing alive
            done.set()
            with self._done:
                self._num_open -= 1
                self._done.notify_all()
