"""A machine that was measured for the tests, in little time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe import MachineProfile, measure_machine


@pytest.fixture(scope="session")
def small_machine() -> MachineProfile:
    """This machine by tiny measurements."""
    return measure_machine(
        torch.device("cpu"),
        copy_bytes=[1 << 12, 1 << 20],
        num_parameters=1 << 16,
        threads=[1],
        widths=[32, 128],
        memory_bytes=[1 << 12, 1 << 20],
        num_samples=2,
    )


@pytest.fixture
def copies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program wait for each copy, so that peaks are equal from run to run."""
    queue = ThreadLanes._queue

    def queue_and_wait(self: ThreadLanes, *args: Any) -> Event:
        done = queue(self, *args)
        done.synchronize()
        return done

    monkeypatch.setattr(ThreadLanes, "_queue", queue_and_wait)
