"""Weights that an update has just changed in memory are used from there, while their files are still written."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lightning_superpipe import attach
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer import stored
from lightning_superpipe.optimizer.bench import Bench
from tests.disk.loops import Left, left, make, step, train
from tests.tiers.late_files import hold

pytestmark = pytest.mark.filterwarnings("ignore")
Patch = pytest.MonkeyPatch
STEPS = 4


@pytest.mark.parametrize("is_announced", [False, True])
def test_forward_begins_while_weights_are_still_written(is_announced: bool, monkeypatch: Patch) -> None:
    publish, may_write, came_in_time = Bench.publish, threading.Event(), []

    def held(self: Bench, *args: Any) -> None:
        if self.unit.index < 2:
            came_in_time.append(may_write.wait(30))
        publish(self, *args)

    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk") as pipe:
        announcing = {"announced_by": pipe} if is_announced else {}
        losses = [step(model, optimizer, number, **announcing) for number in range(2)]
        left(model, optimizer)  # nothing is under way
        monkeypatch.setattr(Bench, "publish", held)
        losses.append(step(model, optimizer, 2, **announcing))
        handle = model.blocks[1].register_forward_hook(lambda *_: may_write.set())
        losses.append(step(model, optimizer, 3, **announcing))
        handle.remove()
    assert came_in_time
    assert all(came_in_time), "two units were to be computed before their files were written"
    assert left(model, optimizer, losses).equals(train(None, steps=STEPS))


def without_waiting_for_the_update(patch: Patch) -> None:
    """Weights are taken before the part has run."""
    update = stored._update

    def early(job: Any, fetched: Any) -> None:
        fetched.synchronize()
        job.bench._updated = job.ledger
        job.changed.set()
        time.sleep(0.05)
        update(job, fetched)

    patch.setattr(stored, "_update", early)
    patch.setattr(Bench, "note_updated", lambda *_: None)


def test_weights_are_not_taken_before_they_have_changed(monkeypatch: Patch) -> None:
    expected = train(None, steps=STEPS)
    assert train({"store": "disk"}, steps=STEPS).equals(expected)
    without_waiting_for_the_update(monkeypatch)
    assert not train({"store": "disk"}, steps=STEPS).equals(expected)


# -- a forward that changes weights while their file is written


def train_clamped(options: dict[str, Any] | None) -> Left:
    """Train blocks that limit their weights in each forward, which has to reach the host."""
    model, optimizer = make()

    def clamp(block: Any, _: Any) -> None:
        with torch.no_grad():
            block.up.weight.clamp_(-0.05, 0.05)

    for block in model.blocks:
        block.register_forward_pre_hook(clamp)
    if options is None:
        return left(model, optimizer, [step(model, optimizer, number) for number in range(STEPS)])
    with attach(model, optimizer, device="cpu", k=2, **options):
        losses = [step(model, optimizer, number) for number in range(STEPS)]
    return left(model, optimizer, losses)


def without_the_end_of_the_update(patch: Patch) -> None:
    """What a forward has changed is brought home while the update writes there."""
    settle = Unit.settle

    def unless_copied_back(self: Unit) -> None:
        if self.slot is None:
            settle(self)

    patch.setattr(Unit, "settle", unless_copied_back)


def test_weights_changed_by_a_forward_are_brought_home_behind_the_write(monkeypatch: Patch) -> None:
    expected = train_clamped(None)
    hold(monkeypatch, "store", lambda _: time.sleep(0.02))
    assert train_clamped({"store": "disk"}).equals(expected)
    without_the_end_of_the_update(monkeypatch)
    assert not train_clamped({"store": "disk"}).equals(expected)
