"""Casts on the host wait for what they read and for who reads them; without one of these fences numbers are wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_superpipe.config import Adversary, Link
from lightning_superpipe.engine import staging
from lightning_superpipe.engine.host_lane import Past
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.staging import Staged, WireStaging
from lightning_superpipe.engine.unit import Unit
from tests.precision.loops import Outcome, assert_same, streamed, wired
from tests.precision.modules import chain_case

Patch = pytest.MonkeyPatch
CASE = chain_case(6, 3)
DEVICES = ["cpu", pytest.param("emu:0", marks=pytest.mark.emu)]
LATE_UPDATES = {"adversary": Adversary(max_delay_ms=25.0, seed=1), "k": 3}
SLOW_COPIES = {"link": Link(latency_ms=8.0), "adversary": None, "k": 5, "k_prime": 2}


def late_casts(patch: Patch) -> None:
    """Each cast takes its time."""
    cast = staging._cast

    def late(free: Event, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        time.sleep(0.01)
        cast(free, targets, sources)

    patch.setattr(staging, "_cast", late)


def small_ring(patch: Patch) -> None:
    """The buffer of each cast is the one that is being copied."""
    patch.setattr(staging, "NUM_BUFFERS", 1)


def without_update(patch: Patch) -> None:
    """A cast does not wait for the unit's update."""
    stage = WireStaging.stage
    patch.setattr(
        WireStaging,
        "stage",
        lambda self, unit, *, after, **rest: stage(self, unit, after=Past(), **rest),
    )


def without_cast(patch: Patch) -> None:
    """A copy does not wait for the cast."""
    stage = WireStaging.stage

    def unfenced(self: WireStaging, unit: Unit, **rest: Any) -> Staged:
        return stage(self, unit, **rest)._replace(ready=Past())

    patch.setattr(WireStaging, "stage", unfenced)


def without_copy(patch: Patch) -> None:
    """A cast does not wait for the copy that reads its buffer."""
    patch.setattr(Staged, "hold_until", lambda self, arrival: None)


HAZARDS: list[tuple[Callable[[Patch], None] | None, Callable[[Patch], None], dict[str, Any]]] = [
    (None, without_update, LATE_UPDATES),
    (late_casts, without_cast, SLOW_COPIES),
    (small_ring, without_copy, SLOW_COPIES),
]


def train(device: str, options: dict[str, Any]) -> Outcome:
    return streamed(CASE, device=device, wire_dtype="bfloat16", **options)


def is_same(device: str, options: dict[str, Any]) -> bool:
    try:
        assert_same(train(device, options), wired(CASE, torch.bfloat16, device=device))
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("hazard", "remove", "options"), HAZARDS, ids=lambda value: getattr(value, "__name__", ""))
def test_numbers_are_right_under_the_worst_timing_and_wrong_without_the_fence(
    hazard: Callable[[Patch], None] | None,
    remove: Callable[[Patch], None],
    options: dict[str, Any],
    device: str,
    monkeypatch: Patch,
) -> None:
    if hazard is not None:
        hazard(monkeypatch)
    assert is_same(device, options)
    remove(monkeypatch)
    assert not is_same(device, options)
