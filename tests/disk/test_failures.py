"""A read or a write that fails stops the step with the unit's name; the step is undone, and training goes on.

Errors are injected below everything of ours: in the system calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe import attach
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import BudgetError, TransferError, UnsupportedError
from lightning_superpipe.session import Session
from tests.disk.loops import NUM_BLOCKS, WIDTH, Left, left, make, step

pytestmark = pytest.mark.filterwarnings("ignore")
Patch = pytest.MonkeyPatch
NUM_GOOD, NUM_ALL = 3, 6


class Fault:
    """Makes one system call after so many others raise, or come back short; from then on nothing fails."""

    def __init__(self, name: str, after: int, *, is_short: bool = False) -> None:
        self._call: Callable[..., int] = getattr(os, name)
        self._left, self._is_short, self._lock = after, is_short, threading.Lock()
        self.has_struck = False

    def __call__(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        with self._lock:
            self._left -= 1
            strikes = self._left == -1
        if strikes:
            self.has_struck = True
            if self._is_short:
                return self._call(descriptor, [buffers[0][:512]], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._call(descriptor, buffers, offset)


def reference() -> list[Left]:
    """What the ordinary run holds after each number of steps."""
    model, optimizer = make()
    found = [left(model, optimizer)]
    for number in range(NUM_ALL):
        step(model, optimizer, number)
        found.append(left(model, optimizer))
    return found


def finished(expected: list[Left], model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """The number of steps after which the ordinary run holds just this; None if it never does."""
    now = left(model, optimizer)
    return next((number for number, state in enumerate(expected) if state.equals(now)), None)


def train_to_the_end(expected: list[Left], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step has failed: what is left is that of a finished step, and training goes on from there."""
    optimizer.zero_grad()
    at = finished(expected, model, optimizer)
    assert at is not None, "weights and states are not those of a finished step"
    for number in range(at, NUM_ALL):
        step(model, optimizer, number)
    assert finished(expected, model, optimizer) == NUM_ALL


@pytest.mark.parametrize("update", ["at_once", "after_backward"])
@pytest.mark.parametrize("after", [0, 1, 4, 7, 11])
@pytest.mark.parametrize(
    ("name", "is_short"), [("pwritev", False), ("pwritev", True), ("preadv", False), ("preadv", True)]
)
def test_failed_step_is_undone_and_training_goes_on_bit_for_bit(
    name: str, is_short: bool, after: int, update: str, monkeypatch: Patch
) -> None:
    expected = reference()
    model, optimizer = make()
    pipe = attach(model, optimizer, device="cpu", k=2, store="disk", update=update)
    for number in range(NUM_GOOD):
        step(model, optimizer, number)
    assert finished(expected, model, optimizer) == NUM_GOOD  # which waits for all that is under way
    fault = Fault(name, after, is_short=is_short)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fault)
        with pytest.raises(TransferError, match=r"unit 'blocks\.\d'"):
            for number in range(NUM_GOOD, NUM_ALL):
                step(model, optimizer, number)
    assert fault.has_struck
    train_to_the_end(expected, model, optimizer)
    pipe.close()
    assert finished(expected, model, optimizer) == NUM_ALL


@pytest.mark.parametrize("after", range(0, 36, 3))
@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_failed_step_that_was_announced_is_undone_with_what_backward_left_for_it(
    name: str, after: int, monkeypatch: Patch
) -> None:
    expected = reference()
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk", disk={"ring": 4}) as pipe:
        for number in range(NUM_GOOD):
            step(model, optimizer, number, announced_by=pipe)
        assert finished(expected, model, optimizer) == NUM_GOOD
        fault = Fault(name, after)
        with monkeypatch.context() as patched, pytest.raises(TransferError, match=r"unit 'blocks\.\d'"):
            patched.setattr(os, name, fault)
            for number in range(NUM_GOOD, NUM_ALL):
                step(model, optimizer, number, announced_by=pipe)
            left(model, optimizer)  # who looks is told
        assert fault.has_struck
        train_to_the_end(expected, model, optimizer)


@pytest.mark.parametrize("host_memory", [None, "1GiB"])
@pytest.mark.parametrize("store", ["disk", {"states": "disk"}, {"weights": "disk"}])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("update", ["at_once", "after_backward"])
def test_failed_step_is_undone_where_a_part_of_it_is_in_memory(
    store: Any, after: int, update: str, host_memory: str | None, monkeypatch: Patch
) -> None:
    expected = reference()
    model, optimizer = make()
    if host_memory is not None:
        host_memory = str(24 * sum(parameter.numel() for parameter in model.parameters()))  # for a part of the units
    with attach(model, optimizer, device="cpu", k=2, store=store, update=update, host_memory=host_memory):
        for number in range(NUM_GOOD):
            step(model, optimizer, number)
        assert finished(expected, model, optimizer) == NUM_GOOD
        fault = Fault("pwritev", after)
        with monkeypatch.context() as patched, pytest.raises(TransferError, match="has been undone"):
            patched.setattr(os, "pwritev", fault)
            for number in range(NUM_GOOD, NUM_ALL):
                step(model, optimizer, number)
            left(model, optimizer)  # who looks is told
        train_to_the_end(expected, model, optimizer)


def test_first_step_is_undone_with_the_states_that_it_made(monkeypatch: Patch) -> None:
    model, optimizer = make()
    before = left(model, optimizer)
    with attach(model, optimizer, device="cpu", k=2, store="disk"):
        with monkeypatch.context() as patched, pytest.raises(TransferError, match="has been undone"):
            patched.setattr(os, "pwritev", Fault("pwritev", 3))
            step(model, optimizer, 0)
        assert left(model, optimizer).equals(before)
        optimizer.zero_grad()
        assert finished(reference(), model, optimizer) == 0
        step(model, optimizer, 0)
        assert finished(reference(), model, optimizer) == 1


def test_without_undo_the_message_says_that_weights_are_mixed(monkeypatch: Patch) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk", disk={"undo": False}, update="at_once"):
        step(model, optimizer, 0)
        with (
            monkeypatch.context() as patched,
            pytest.raises(TransferError, match="not those of a finished step") as told,
        ):
            patched.setattr(os, "pwritev", Fault("pwritev", 3))
            step(model, optimizer, 1)
    assert "last checkpoint" in str(told.value)
    assert finished(reference(), model, optimizer) is None


def test_failure_that_nobody_has_met_is_told_at_the_end(monkeypatch: Patch) -> None:
    expected = reference()
    model, optimizer = make()
    pipe = attach(model, optimizer, device="cpu", k=2, store="disk", update="after_backward")
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    finished(expected, model, optimizer)
    with monkeypatch.context() as patched, pytest.raises(TransferError, match="undone"):
        patched.setattr(os, "pwritev", Fault("pwritev", 5))
        step(model, optimizer, 2)
        pipe.close()
    assert finished(expected, model, optimizer) == 2


@pytest.mark.parametrize("is_full", [True, False])
def test_disk_without_room_is_refused_before_training(is_full: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, optimizer = make()
    if is_full:
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BudgetError, match=r"needs .* more in .*disk has"):
        attach(model, optimizer, device="cpu", k=2, store="disk", disk={"folder": str(tmp_path / "store")})
    monkeypatch.undo()
    with attach(model, optimizer, device="cpu", k=2, store="disk", disk={"folder": str(tmp_path / "store")}):
        step(model, optimizer, 0)


@pytest.mark.parametrize("name", ["preadv", "pwritev", "fsync"])
def test_disk_that_fails_at_the_start_is_not_said_to_be_full(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    model, optimizer = make()
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(UnsupportedError, match=r"cannot use the folder .*Input/output error.*disk\.folder"):
        attach(model, optimizer, device="cpu", k=2, store="disk", disk={"folder": str(tmp_path / "store")})
    assert not (tmp_path / "store").exists()


def interrupt(_: torch.Tensor) -> None:
    raise KeyError("of the user's")


@pytest.mark.parametrize("store", ["disk", {"states": "disk"}, {"weights": "disk"}])
def test_step_that_is_interrupted_in_backward_is_undone(store: Any) -> None:
    expected = reference()
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store=store) as pipe:
        for number in range(NUM_ALL + 1):  # one of them is interrupted
            is_broken = number == NUM_GOOD
            at = number - (number > NUM_GOOD)
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(at)).requires_grad_()
            if is_broken:
                written = pipe.report().total.disk_written_bytes
                x.register_hook(interrupt)  # when all units but the first have been updated
            loss = model(x).float().pow(2).mean()
            with pytest.raises(KeyError) if is_broken else contextlib.nullcontext(), pipe.updating(optimizer):
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            if is_broken:
                assert finished(expected, model, optimizer) == NUM_GOOD
                assert pipe.report().total.disk_written_bytes > written, "nothing was there to be undone"
        assert finished(expected, model, optimizer) == NUM_ALL


class LastWrite(Fault):
    """Fails as late as that: once the next forward has begun to use what the other parts of the step have left."""

    def __init__(self, after: int) -> None:
        super().__init__("pwritev", after)
        self.may_fail = threading.Event()

    def __call__(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        if self._left == 0:
            assert self.may_fail.wait(60)
        return super().__call__(descriptor, buffers, offset)


def test_weights_of_a_step_that_was_undone_later_do_not_stay_where_they_were_loaded(monkeypatch: Patch) -> None:
    """Between the failure and the next step nobody writes to weights, so that what is loaded could be used again."""
    expected = reference()
    model, optimizer = make()
    config = SuperpipeConfig(k=NUM_BLOCKS, k_prime=1, store="disk", update="after_backward")
    session = Session(model, config, torch.device("cpu"), trains=True, owns_root=True)
    session.attend([optimizer])

    def undisturbed(number: int) -> None:
        with session.step("train", is_undisturbed=True):
            step(model, optimizer, number)

    for number in range(NUM_GOOD):
        undisturbed(number)
    assert finished(expected, model, optimizer) == NUM_GOOD
    fault = LastWrite(after=2 * NUM_BLOCKS - 1)  # weights and states of each
    with monkeypatch.context() as patched, pytest.raises(TransferError, match="has been undone"):
        patched.setattr(os, "pwritev", fault)
        undisturbed(NUM_GOOD)
        model.blocks[3].register_forward_hook(lambda *_: fault.may_fail.set())
        undisturbed(NUM_GOOD + 1)
    optimizer.zero_grad()
    assert finished(expected, model, optimizer) == NUM_GOOD
    for number in range(NUM_GOOD, NUM_ALL):
        undisturbed(number)
    assert finished(expected, model, optimizer) == NUM_ALL
    session.close()
