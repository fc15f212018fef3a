"""What the tests of memory share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from lightning_superpipe.engine.host_lane import HostEvent, HostLane
from lightning_superpipe.engine.lanes import Event


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> Iterator[None]:
    """Leave everything that was there before out of `gc.collect()`: these tests call it a lot."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def gradients_land_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backward wait for each copy, so that peaks are equal from run to run."""
    submit = HostLane.submit

    def submit_and_wait(
        self: HostLane, job: Callable[[], None], *, after: Event, done: HostEvent | None = None
    ) -> HostEvent:
        done = submit(self, job, after=after, done=done)
        del job
        self.wait()
        return done

    monkeypatch.setattr(HostLane, "submit", submit_and_wait)


@pytest.fixture
def everything_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest activation be offloaded."""
    monkeypatch.setattr("lightning_superpipe.engine.offload.MIN_BYTES", 1)
