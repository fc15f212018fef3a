"""The host after many runs: no thread, no memory, no hook is left."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from lightning_superpipe.config import Adversary, Link, SuperpipeConfig
from lightning_superpipe.session import Session
from tests.engine.tiny import CPU, batches, train
from tests.parity.harness import Window, streamed, trainer
from tests.parity.probe import ProbeModule

WIDTH, NUM_UNITS = 512, 3
MODEL_BYTES = NUM_UNITS * WIDTH * WIDTH * 4

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
]


def resident_bytes() -> int:
    """Return the memory in use by this process, after what can be given back was given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def wide_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(NUM_UNITS)])


def run_session(module: nn.Module, *, closes: bool = True) -> None:
    config = SuperpipeConfig(k=2, adversary=Adversary(max_delay_ms=0.1))
    session = Session(module, config, CPU, trains=True, owns_root=True)
    train(module, batches(1, width=WIDTH), lambda: session.step("train"), fused=True)
    if closes:
        session.close()


def test_ten_sessions_leave_host_memory_as_one_does() -> None:
    for _ in range(2):
        run_session(wide_chain())
    before = resident_bytes()
    for _ in range(10):
        run_session(wide_chain())
    assert resident_bytes() - before < MODEL_BYTES


def test_sessions_after_each_other_on_one_model_take_no_more() -> None:
    module = wide_chain()
    for _ in range(2):
        run_session(module)
    before = resident_bytes()
    for _ in range(10):
        run_session(module)
    assert resident_bytes() - before < MODEL_BYTES


def test_two_hundred_steps_leave_host_memory_flat() -> None:
    module = wide_chain()
    session = Session(module, SuperpipeConfig(k=2), CPU, trains=True, owns_root=True)
    train(module, batches(1, width=WIDTH) * 5, lambda: session.step("train"), fused=True)
    before = resident_bytes()
    train(module, batches(1, width=WIDTH) * 200, lambda: session.step("train"), fused=True)
    grown = resident_bytes() - before
    session.close()
    assert grown < MODEL_BYTES


def test_threads_end_with_their_session() -> None:
    before, module = threads(), wide_chain()
    session = Session(module, SuperpipeConfig(k=2, link=Link()), CPU, trains=True, owns_root=True)
    train(module, batches(1, width=WIDTH), lambda: session.step("train"))
    started = sorted(thread.name for thread in threads() - before)
    assert started == ["superpipe-d2h", "superpipe-h2d", "superpipe-host"]
    session.close()
    assert threads() == before


def test_nothing_of_a_closed_session_stays_alive() -> None:
    module = wide_chain()
    session = Session(module, SuperpipeConfig(k=2), CPU, trains=True, owns_root=True)
    train(module, batches(1, width=WIDTH), partial(session.step, "train"))
    kept = [weakref.ref(part) for part in (session, session._engine, session._engine.slots, session._tier)]
    session.close()
    del session
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4
    assert module(batches(1, width=WIDTH)[0]).isfinite().all()


def test_hooks_on_all_optimizers_are_taken_off() -> None:
    def hooks() -> int:
        before, after = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
        return len(before) + len(after)

    before = hooks()
    module = wide_chain()
    session = Session(module, SuperpipeConfig(k=2), CPU, trains=True, owns_root=True)
    assert hooks() > before
    session.close()
    session.close()
    assert hooks() == before


def test_session_that_raises_ends_its_threads_too() -> None:
    before, module = threads(), wide_chain()
    session = Session(module, SuperpipeConfig(k=2), CPU, trains=True, owns_root=True)
    with pytest.raises(ValueError, match="of the test"), session.step("train"):
        module(batches(1, width=WIDTH)[0]).sum().backward()
        raise ValueError("of the test")
    session.close()
    assert threads() == before


def test_fits_leave_threads_and_memory_as_they_were() -> None:
    def fit() -> None:
        torch.manual_seed(0)
        trainer("cpu", streamed(Window(2, 1))).fit(ProbeModule())

    fit()
    before = threads(), resident_bytes()
    for _ in range(5):
        fit()
    after = threads(), resident_bytes()
    assert after[0] == before[0]
    assert after[1] - before[1] < 8 * 2**20
