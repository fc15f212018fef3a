"""Activations in files: whatever is late, equal with all fences and wrong without them; memory and files used again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from queue import Queue

import pytest
import torch
from torch import Tensor

from lightning_superpipe import attach
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine import file_hop, offload
from lightning_superpipe.engine.activations import Policy
from lightning_superpipe.engine.host_lane import Regardless
from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.planning.need import ACTIVATION_BUFFERS
from lightning_superpipe.tiers import Places
from lightning_superpipe.tiers.disk import DiskSlab
from tests.engine.held_lanes import HeldLanes
from tests.engine.policies import choices
from tests.engine.test_offload import check_backward_after_the_session, poisoned, with_events
from tests.engine.tiny import CPU, Chain, Result, batches, chain, is_equal, open_engine, train
from tests.tiers.late_files import hold

pytestmark = [pytest.mark.usefixtures("everything_travels"), pytest.mark.filterwarnings("ignore")]

NUM_BLOCKS, NUM_STEPS = 6, 3
PATIENCE_S = 60
Patch = pytest.MonkeyPatch


@cache
def reference() -> Result:
    return train(chain(NUM_BLOCKS, dropout=0.1), batches(NUM_STEPS))


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(monkeypatch: Patch) -> None:
    monkeypatch.setattr(offload, "_empty", poisoned)


@pytest.fixture
def files() -> Iterator[Places]:
    """Activations in files, all else in memory; the engine closes it."""
    yield Places(SuperpipeConfig(store={"activations": "disk"}), pin=False, trains=True)


def train_with(tier: Places, lanes: Lanes, k: int = 2) -> Result:
    module, policies = chain(NUM_BLOCKS, dropout=0.1), choices(Policy.OFFLOAD, NUM_BLOCKS)
    with open_engine(module, lanes, k=k, choices=policies, tier=tier) as engine:
        if isinstance(lanes, HeldLanes):
            lanes.attend(engine.gradients)
        found = train(module, batches(NUM_STEPS), partial(engine.step, "train"))
    assert tier.traffic.read > 0
    return found


@pytest.mark.parametrize("k", [1, 2, NUM_BLOCKS])
@pytest.mark.parametrize("seed", range(3))
def test_reads_and_writes_may_take_any_time(files: Places, k: int, seed: int, monkeypatch: Patch) -> None:
    rng = random.Random(seed)
    for name in ("fetch", "store"):
        hold(monkeypatch, name, lambda _: time.sleep(rng.random() * 4e-3))
    lanes = ThreadLanes(CPU, None, max_delay_ms=0.5, seed=seed)
    assert is_equal(train_with(files, lanes, k), reference())


@pytest.mark.parametrize("held", [Lane.H2D, Lane.D2H], ids=str)
def test_copies_may_be_as_late_as_they_like(files: Places, held: Lane) -> None:
    assert is_equal(train_with(files, HeldLanes(CPU, held)), reference())


# -- without one of the fences: what would have been waited for comes last, however fast the rest is


def without_finished_write(patch: Patch) -> None:
    """Reads do not wait for writes, and the first is over when writes begin."""
    patch.setattr(file_hop._Shelf, "ensure", lambda self: None)
    patch.setattr(file_hop, "ACTIVATION_BUFFERS", 2 * NUM_BLOCKS)  # or a buffer is waited for
    over, fetch = Queue[None](), DiskSlab.fetch
    patch.setattr(DiskSlab, "fetch", lambda self, memory: (fetch(self, memory), over.put(None)))
    hold(patch, "store", lambda number: None if number else over.get(timeout=PATIENCE_S))


def without_free_buffer(patch: Patch) -> None:
    """Copies go into buffers that have not been written yet: the first one's is in use again when its write begins."""
    patch.setattr(Regardless, "query", lambda self: True)
    patch.setattr(Regardless, "synchronize", lambda self: None)
    ends = with_events(patch, "d2h")

    def one_copy_more_than_buffers(number: int) -> None:
        for _ in range(0 if number else ACTIVATION_BUFFERS + 1):
            ends.get(timeout=PATIENCE_S).synchronize()

    hold(patch, "store", one_copy_more_than_buffers)


def without_finished_read(patch: Patch) -> None:
    """The copy to the device does not wait for the read, and is over when the read begins."""
    ends = with_events(patch, "h2d", lambda after: after[:1])
    hold(patch, "fetch", lambda _: ends.get(timeout=PATIENCE_S).synchronize())


@pytest.mark.parametrize("remove", [without_finished_write, without_free_buffer, without_finished_read])
def test_numbers_are_wrong(files: Places, remove: Callable[[Patch], None], monkeypatch: Patch) -> None:
    remove(monkeypatch)
    assert not is_equal(train_with(files, ThreadLanes(CPU, None)), reference())


# -- memory and files


def test_buffers_and_files_are_used_again_in_every_step(files: Places) -> None:
    module, found = chain(NUM_BLOCKS, dropout=0.1), []
    with open_engine(module, ThreadLanes(CPU, None), choices=choices(Policy.OFFLOAD, NUM_BLOCKS), tier=files) as engine:
        for _ in range(5):
            train(module, batches(2), partial(engine.step, "train"))
            found.append((files.disks["activations"].file.size, files.part("wire").allocated_bytes))
        largest = max(slab.room_bytes for slab in files.disks["activations"].slabs)
    assert len(set(found)) == 1
    assert found[0][1] <= ACTIVATION_BUFFERS * largest


def test_batches_of_other_sizes_use_the_same_files(files: Places) -> None:
    module, reference_module = chain(NUM_BLOCKS), chain(NUM_BLOCKS)
    inputs = [torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (300, 4, 700, 50, 700)]
    policies = choices(Policy.OFFLOAD, NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), choices=policies, tier=files) as engine:
        found = train(module, inputs, partial(engine.step, "train"))
        num_slabs = len(files.disks["activations"].slabs)
    assert is_equal(found, train(reference_module, inputs))
    assert num_slabs <= NUM_BLOCKS


def test_graphs_that_nobody_goes_back_through_give_their_room_back(files: Places) -> None:
    module, sizes = chain(NUM_BLOCKS), []
    policies = choices(Policy.OFFLOAD, NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), choices=policies, tier=files) as engine:
        for x in batches(6):
            with engine.step("train"):
                module(x)
            sizes.append(files.disks["activations"].file.size)
    assert len(set(sizes[1:])) == 1


def test_backward_after_the_session_reads_the_file(files: Places, monkeypatch: Patch) -> None:
    hold(monkeypatch, "store", lambda _: time.sleep(2e-2))
    check_backward_after_the_session(files)


# -- failures


def broken(patch: Patch, name: str, after: int) -> list[str]:
    """Let reads or writes of activations fail after so many; return a list that says which have."""
    original, left, struck = getattr(DiskSlab, name), [after], []

    def failing(self: DiskSlab, memory: Tensor) -> None:
        if self._tier.kind == "activations":
            left[0] -= 1
            if left[0] < 0:
                struck.append(name)
                raise TransferError("the disk is gone")
        original(self, memory)

    patch.setattr(DiskSlab, name, failing)
    return struck


def one_step(model: Chain, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["fetch", "store"])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("others", [{}, {"weights": "disk", "states": "disk"}], ids=["alone", "with all else"])
def test_failure_stops_backward_with_the_units_name_and_training_goes_on(
    others: dict[str, str], name: str, after: int, monkeypatch: Patch
) -> None:
    xs, store = batches(4), {"activations": "disk", **others}
    expected, model = chain(NUM_BLOCKS), chain(NUM_BLOCKS)
    plain, optimizer = (torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False) for each in (expected, model))
    for x in xs:
        one_step(expected, plain, x)
    with attach(model, optimizer, device="cpu", k=2, activations="offload", store=store) as pipe:
        for x in xs[:2]:
            one_step(model, optimizer, x)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with monkeypatch.context() as patched:
            struck = broken(patched, name, after)
            with pytest.raises(TransferError, match=r"unit 'blocks\.\d': the disk is gone"):
                one_step(model, optimizer, xs[2])
            assert struck
        optimizer.zero_grad()
        assert all(map(torch.equal, model.parameters(), before)), "the step has not happened"
        for x in xs[2:]:
            one_step(model, optimizer, x)
        assert pipe.report().total.disk_written_bytes > 0
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
