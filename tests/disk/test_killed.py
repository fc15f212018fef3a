"""Killed at any moment, training in files goes on from the last checkpoint, to the bits of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_superpipe import attach, open_kept
from lightning_superpipe.errors import UnsupportedError
from tests.disk.loops import Left, left, make, step
from tests.processes import CONTEXT

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_KILLS, NUM_STEPS, MAX_WAIT_S = 20, 5000, 0.4


def options(folder: Path, *, keep: bool) -> dict[str, Any]:
    return {"device": "cpu", "k": 2, "store": "disk", "disk": {"folder": str(folder / "store"), "keep": keep}}


def go_on(folder: Path, num_steps: int, *, keep: bool, began: Any = None) -> tuple[Left, int]:
    """Train from the last checkpoint, saving after each step; return what is left, and where it began."""
    model, optimizer = make()
    first = 0
    with attach(model, optimizer, **options(folder, keep=keep)):
        if (folder / "last.pt").exists():
            saved = torch.load(folder / "last.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        for number in range(first, num_steps):
            step(model, optimizer, number)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
            torch.save(state, folder / "draft.pt")
            os.replace(folder / "draft.pt", folder / "last.pt")
            if began is not None:
                began.set()
    return left(model, optimizer), first


def work(folder: Path, keep: bool, began: Any) -> None:
    """Train until killed."""
    go_on(folder, NUM_STEPS, keep=keep, began=began)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_run_that_was_killed_goes_on_from_its_checkpoint_bit_for_bit(keep: bool, tmp_path: Path) -> None:
    rng, reached = random.Random(0), 0
    for _ in range(NUM_KILLS // 2):
        began = CONTEXT.Event()
        process = CONTEXT.Process(target=work, args=(tmp_path, keep, began))
        process.start()
        assert began.wait(120)
        time.sleep(rng.random() * MAX_WAIT_S)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(UnsupportedError, match="last checkpoint"):  # no manifest: nothing can be taken for whole
            open_kept(tmp_path / "store")
        now = torch.load(tmp_path / "last.pt")["step"]
        assert now > reached
        reached = now
    assert reached < NUM_STEPS, "the last run was over before it was killed"
    got, first = go_on(tmp_path, reached + 2, keep=keep)
    assert first == reached
    model, optimizer = make()
    for number in range(reached + 2):
        step(model, optimizer, number)
    assert got.equals(left(model, optimizer))
    assert (tmp_path / "store" / "manifest.json").exists() == keep
