"""Bytes on the device, counted by the device: flat from step to step, none after the end, however it ended."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.session import Session
from tests.emu import capacity, peak_bytes, reset_peak, used_bytes
from tests.engine.tiny import Block, Chain, Result, batches, is_equal, train

pytestmark = [pytest.mark.emu, pytest.mark.filterwarnings("ignore")]

WIDTH, NUM_BLOCKS = 32, 6
SLOT_BYTES = 17_408  # of one block of that width


class Ending(Block):
    """Raises in forward or in backward when told."""

    where = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            raise ValueError("told to raise in forward")
        x = super().forward(x)
        if self.where == "backward":
            x.register_hook(_raise)  # type: ignore[no-untyped-call]
        return x


def _raise(gradient: Tensor) -> Tensor:
    raise ValueError("told to raise in backward")


def model(num_blocks: int = NUM_BLOCKS) -> Chain:
    """Return a chain with an anchor, a buffer and one block that can raise; the same weights each time."""
    torch.manual_seed(0)
    module = Chain(num_blocks, width=WIDTH, dropout=0.1)
    module.blocks[2] = Ending(WIDTH)
    module.head = nn.Linear(WIDTH, WIDTH, bias=False)
    module.first = nn.Linear(WIDTH, WIDTH, bias=False)
    module.first.weight = module.head.weight
    module.register_forward_hook(lambda module, args, output: module.head(module.first(output)))
    module.blocks.append(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)))
    return module


def ending(module: Chain, where: str) -> None:
    block = module.blocks[2]
    assert isinstance(block, Ending)
    block.where = where


class Bytes(NamedTuple):
    """Device bytes above those in use at the start."""

    base: int

    @property
    def now(self) -> int:
        gc.collect()
        return used_bytes() - self.base

    def are_gone(self) -> bool:
        """Whether nothing is held; autograd's thread lets go of a graph a moment after an error has reached us."""
        deadline = time.monotonic() + 5
        while self.now and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.now == 0


@pytest.fixture
def held(emu: torch.device) -> Bytes:
    gc.collect()
    return Bytes(used_bytes())


def session_of(module: nn.Module, emu: torch.device, k: int = 2) -> Session:
    return Session(module, SuperpipeConfig(k=k), emu, trains=True, owns_root=True)


@contextlib.contextmanager
def closing(session: Session) -> Any:
    try:
        yield session
    finally:
        session.close()


def stream(module: Chain, emu: torch.device, num_steps: int = 2, k: int = 2) -> Result:
    inputs = [x.to(emu) for x in batches(num_steps, width=WIDTH)]
    with closing(session_of(module, emu, k)) as session:
        return train(module, inputs, lambda: session.step("train"))


# -- flat


def test_bytes_are_flat_over_two_hundred_steps(emu: torch.device, held: Bytes, gradients_land_at_once: None) -> None:
    module, after, peaks = model(3), [], []
    session = session_of(module, emu)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    x = batches(1, width=WIDTH)[0].to(emu)
    for _ in range(200):
        reset_peak()
        with session.step("train"):
            loss = module(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        after.append(used_bytes() - held.base)
        peaks.append(peak_bytes() - held.base)
    session.close()
    assert set(after[2:]) == {after[2]}
    assert set(peaks[2:]) == {peaks[2]}
    del x
    assert held.are_gone()


@pytest.mark.parametrize("mode", ["train", "validate"])
def test_window_is_all_that_is_held_between_steps(emu: torch.device, held: Bytes, mode: str) -> None:
    module = model()
    anchors = sum(tensor.nbytes for tensor in (module.get_parameter("head.weight"), *module.buffers()))
    with closing(session_of(module, emu, k=3)) as session:
        for x in batches(3, width=WIDTH):
            with session.step(mode), torch.set_grad_enabled(mode == "train"):
                loss = module(x.to(emu)).pow(2).mean()
            if mode == "train":
                loss.backward()
            del loss
        assert held.now == 3 * SLOT_BYTES + anchors


# -- nothing left


@pytest.mark.parametrize("k", [1, 2, 99])
def test_nothing_is_held_after_an_ordinary_end(emu: torch.device, held: Bytes, k: int) -> None:
    module = model()
    stream(module, emu, k=k)
    assert held.are_gone()
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("keeps_error", [False, True], ids=["", "error-kept"])
def test_nothing_is_held_after_an_exception(emu: torch.device, held: Bytes, where: str, keeps_error: bool) -> None:
    module, errors = model(), []
    stream(module, emu)
    ending(module, where)
    try:
        stream(module, emu)
    except ValueError as error:
        errors.append(error.with_traceback(None) if keeps_error else None)
    assert errors
    assert held.are_gone()
    ending(module, "")
    reference = model()
    stream(reference, emu)
    assert is_equal(stream(module, emu), stream(reference, emu)), "the next run is exact"


@cache
def needed_bytes() -> int:
    """Return the most bytes that a run has on the device."""
    gc.collect()
    base = used_bytes()
    reset_peak()
    stream(model(), torch.device("emu", 0))
    return peak_bytes() - base


def out_of_memory_at(module: Chain, emu: torch.device, num_bytes: int) -> bool:
    """Whether a run in so many bytes ends for want of memory."""
    try:
        with capacity(num_bytes):
            stream(module, emu)
    except torch.OutOfMemoryError:
        return True
    return False


@pytest.mark.parametrize("percent", [0, 20, 40, *range(50, 100, 5), 99])
def test_nothing_is_held_after_running_out_of_memory(
    emu: torch.device, held: Bytes, gradients_land_at_once: None, percent: int
) -> None:
    needed, module = needed_bytes(), model()
    assert out_of_memory_at(module, emu, held.base + needed * percent // 100)
    assert held.are_gone()
    classes = [type(each) for each in module.modules()]
    assert classes == [type(each) for each in model().modules()], "and the model is an ordinary one again"
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


def graph_bytes_of(module: Chain, emu: torch.device, run: Callable[[Chain, Tensor], Tensor]) -> int:
    """Return what the graph of an ordinary forward holds on the device beside the model."""
    module.to(emu)
    before = used_bytes()
    loss = run(module, batches(1, width=WIDTH)[0].to(emu))
    num_bytes = used_bytes() - before
    del loss
    module.to("cpu")
    return num_bytes


def kept_bytes(module: Chain) -> int:
    """Return what a graph may keep besides: the anchor and the buffers that it reads, one element of each twin."""
    anchors = [module.get_parameter("head.weight"), *module.buffers()]
    return sum(tensor.nbytes for tensor in anchors) + 8 * len(list(module.parameters()))


def loss_of(module: Chain, x: Tensor) -> Tensor:
    loss: Tensor = module(x).pow(2).mean()
    return loss


@pytest.mark.parametrize("outcome", ["unused", "walked half-way", "walked"])
def test_graph_that_outlives_the_session_holds_activations_only(emu: torch.device, held: Bytes, outcome: str) -> None:
    activations = graph_bytes_of(model(), emu, loss_of)
    module = model()
    with closing(session_of(module, emu)) as session:
        ending(module, "backward" if outcome == "walked half-way" else "")
        with session.step("train"):
            loss = loss_of(module, batches(1, width=WIDTH)[0].to(emu))
        if outcome != "unused":
            with contextlib.suppress(ValueError):
                loss.backward()  # type: ignore[no-untyped-call]
    assert held.now <= (activations if outcome == "unused" else 0.8 * activations) + kept_bytes(module)
    del loss
    assert held.are_gone()


def test_module_that_holds_its_loss_holds_no_weights(emu: torch.device, held: Bytes) -> None:
    activations = graph_bytes_of(model(), emu, loss_of)
    module = model()
    with closing(session_of(module, emu)) as session, session.step("train"):
        loss = loss_of(module, batches(1, width=WIDTH)[0].to(emu))
        object.__setattr__(module, "last_loss", loss)
        del loss
    assert held.now <= activations + kept_bytes(module)
    del module
    assert held.are_gone()


def test_session_that_cannot_start_leaves_the_model_alone(emu: torch.device, held: Bytes) -> None:
    module = model()
    with capacity(held.base + SLOT_BYTES), pytest.raises(torch.OutOfMemoryError):
        session_of(module, emu, k=3)
    assert held.are_gone()
    assert [type(each) for each in module.modules()] == [type(each) for each in model().modules()]
    stream(module, emu)


def test_dropped_session_gives_its_memory_back(emu: torch.device, held: Bytes) -> None:
    """Nobody closes it: a notebook's cell was interrupted."""
    module = model()
    session = session_of(module, emu)
    with session.step("train"):
        module(batches(1, width=WIDTH)[0].to(emu))
    del session, module
    assert held.are_gone()


# -- what autocast keeps


@pytest.mark.parametrize("mode", ["train", "validate"])
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "float32"])
def test_forward_holds_its_window_also_under_autocast(
    emu: torch.device, held: Bytes, is_autocast: bool, mode: str
) -> None:
    torch.manual_seed(0)
    module = Chain(12, width=128)
    with closing(session_of(module, emu)) as session, torch.set_grad_enabled(mode == "train"):
        x = torch.randn(1, 128, device=emu)
        with session.step(mode), torch.autocast("emu", torch.bfloat16, enabled=is_autocast):
            module(x)
            slot_bytes = session.report().peak.slots // session.k
            assert held.now < 4 * slot_bytes
