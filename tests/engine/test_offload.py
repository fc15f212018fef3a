"""Offloaded activations under the worst timing: equal with all fences, wrong without any of them; memory used again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from queue import Queue
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine import offload as offload_module
from lightning_superpipe.engine.activations import Policy
from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.offload import Offload
from lightning_superpipe.engine.parcels import HostPool, Parcel
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import HostTier, Tier
from tests.engine.held_lanes import HeldLanes
from tests.engine.late_lanes import LANE_ORDERS, LaneOrder, LateCompute, LateLanes
from tests.engine.policies import choices
from tests.engine.tiny import CPU, WIDTH, Block, Chain, Result, batches, chain, is_equal, open_engine, train
from tests.optimizer.late_updates import LateStage

pytestmark = pytest.mark.usefixtures("everything_travels")

NUM_BLOCKS = 6
COMPUTE_FIRST: LaneOrder = (Lane.COMPUTE, Lane.H2D, Lane.D2H)
ARRIVALS_FIRST: LaneOrder = (Lane.H2D, Lane.COMPUTE, Lane.D2H)
DEPARTURES_FIRST: LaneOrder = (Lane.D2H, Lane.COMPUTE, Lane.H2D)
Patch = pytest.MonkeyPatch


@cache
def reference() -> Result:
    return train(chain(NUM_BLOCKS, dropout=0.1), batches(2))


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory often holds what was let go of: with that, no copy would be missed."""
    monkeypatch.setattr(offload_module, "_empty", poisoned)


def poisoned(num_bytes: int, device: torch.device) -> Tensor:
    with raw_tensors():
        return torch.full((num_bytes,), 255, dtype=torch.uint8, device=device)


def train_late(order: LaneOrder | int, k: int = 2) -> Result:
    """Train on a device that computes asynchronously."""
    module, lanes = chain(NUM_BLOCKS, dropout=0.1), LateLanes(CPU, order)
    offloading = choices(Policy.OFFLOAD, NUM_BLOCKS)
    with open_engine(module, lanes, k=k, poison=False, choices=offloading) as engine:
        lanes.attend(engine.gradients)
        around = partial(LateCompute, lanes, engine.slots)
        return train(module, batches(2), partial(engine.step, "train"), around)


@pytest.mark.parametrize("order", [*LANE_ORDERS, 0, 1, 2, 3], ids=str)
def test_every_order_of_lanes_gives_the_same_numbers(order: LaneOrder | int) -> None:
    assert is_equal(train_late(order), reference())
    assert is_equal(train_late(order, k=NUM_BLOCKS), reference())


@pytest.mark.parametrize("held", [Lane.H2D, Lane.D2H], ids=str)
def test_copy_threads_may_be_as_late_as_they_like(held: Lane) -> None:
    module, lanes = chain(NUM_BLOCKS, dropout=0.1), HeldLanes(CPU, held)
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, NUM_BLOCKS)) as engine:
        lanes.attend(engine.gradients)
        assert is_equal(train(module, batches(2), partial(engine.step, "train")), reference())
        assert engine.residency.num_stashed == 0, "nobody holds a twin"


# -- without one of the fences


def with_events(patch: Patch, name: str, change: Callable[[list[Event]], list[Event]] = list) -> Queue[Event]:
    """Change the events that copies of activations wait for; return the ends of these copies, in order."""
    original, ends = getattr(Lanes, name), Queue[Event]()

    def changed(self: Lanes, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        is_of_activations = label.name == "A"
        result: Event = original(self, copies, after=change(list(after)) if is_of_activations else after, label=label)
        if is_of_activations:
            ends.put(result)
        return result

    patch.setattr(Lanes, name, changed)
    return ends


def without_ready_activation(patch: Patch) -> None:
    """The copy home does not wait for the compute that makes the activation."""
    with_events(patch, "d2h", lambda after: [])


def without_held_activation(patch: Patch) -> None:
    """The device's bytes are dropped while their copy home is under way."""
    boundary = Offload.boundary

    def dropping(self: Offload) -> None:
        boundary(self)
        for transit in self._transits:
            for ref in transit.parcels:
                if (parcel := ref()) is not None:
                    parcel.let_go()
        self._transits.clear()

    patch.setattr(Offload, "boundary", dropping)


def without_arrival(patch: Patch) -> None:
    """Compute does not wait for the copy back."""
    fetch = Offload._fetch

    def unfenced(self: Offload, batch: Any) -> None:
        fetch(self, batch)
        for parcel in batch.alive():
            parcel.arrival = None

    patch.setattr(Offload, "_fetch", unfenced)


class Removal(NamedTuple):
    """A fence taken away, and the order of lanes and the window that show it."""

    remove: Callable[[Patch], None]
    order: LaneOrder
    k: int = 2

    def __str__(self) -> str:
        return self.remove.__name__


REMOVALS = [
    Removal(without_ready_activation, DEPARTURES_FIRST),
    Removal(without_held_activation, COMPUTE_FIRST),
    # In a smaller window compute waits for weights, and those arrive after the activations.
    Removal(without_arrival, COMPUTE_FIRST, k=NUM_BLOCKS),
]


@pytest.mark.parametrize("removal", REMOVALS, ids=str)
def test_numbers_are_wrong(removal: Removal, monkeypatch: Patch) -> None:
    removal.remove(monkeypatch)
    assert not is_equal(train_late(removal.order, removal.k), reference())


def recycle(patch: Patch) -> None:
    """Let new device memory be what was let go of last, as an allocator that follows the compute queue does."""
    free: list[Tensor] = []
    end = Parcel.__del__

    def keeping(self: Parcel) -> None:
        if self.device_bytes is not None and self.place is not None:
            free.append(self.device_bytes)
        end(self)

    def recycled(num_bytes: int, device: torch.device) -> Tensor:
        found = next((index for index, each in enumerate(free) if each.numel() == num_bytes), None)
        return poisoned(num_bytes, device) if found is None else free.pop(found)

    patch.setattr(Parcel, "__del__", keeping)
    patch.setattr(offload_module, "_empty", recycled)


@pytest.mark.parametrize("is_fenced", [True, False])
def test_copies_back_wait_for_compute_that_still_reads_their_memory(is_fenced: bool, monkeypatch: Patch) -> None:
    recycle(monkeypatch)
    if not is_fenced:
        with_events(monkeypatch, "h2d", lambda after: after[1:])
    assert is_equal(train_late(ARRIVALS_FIRST), reference()) is is_fenced


@pytest.mark.parametrize("is_held", [True, False])
def test_no_copy_lands_in_memory_that_was_freed(is_held: bool, monkeypatch: Patch) -> None:
    """A backward pass that stops early has prefetched what nobody will read."""
    if not is_held:
        monkeypatch.setattr(Offload, "settle", lambda self: self._arriving.clear())
    module, lanes = chain(NUM_BLOCKS), LateLanes(CPU, COMPUTE_FIRST)
    offloading = choices(Policy.OFFLOAD, NUM_BLOCKS)
    with open_engine(module, lanes, poison=False, choices=offloading) as engine:
        lanes.attend(engine.gradients)
        with engine.step("train"), LateCompute(lanes, engine.slots):
            middle = module.blocks[0](module.blocks[1](batches(1)[0]))
            loss = middle
            for block in module.blocks[2:]:
                loss = block(loss)
            lanes.finish()
            torch.autograd.grad(loss.sum(), middle)
        del loss, middle
        lanes.finish()
    assert bool(lanes.stray_writes) is not is_held


# -- memory


def test_host_memory_is_used_again_in_every_step() -> None:
    module, lanes = chain(NUM_BLOCKS, dropout=0.1), ThreadLanes(CPU, None, max_delay_ms=0.2)
    counts = []
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, NUM_BLOCKS)) as engine:
        for _ in range(6):
            train(module, batches(2), partial(engine.step, "train"))
            counts.append(engine.activations.offload.num_allocations)
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_pool_exchanges_memory_that_has_become_too_small() -> None:
    tier = HostTier(pin=False)
    pool = HostPool(tier)
    for num_bytes in range(1000, 9000, 500):
        places = [pool.take(num_bytes) for _ in range(3)]
        for place in places:
            pool.give_back(place)
    assert tier.allocated_bytes == 3 * 8500
    smallest = pool.take(10)
    assert smallest.slab.num_bytes == 8500, "what is there is used, whatever its size"


class _Late:
    """The end of a copy that is over, as far as others can tell, only when backward of its unit has begun."""

    def __init__(self, inner: Event, unit: int, begun: set[int]) -> None:
        self._inner, self._unit, self._begun = inner, unit, begun

    def query(self) -> bool:
        return self._unit in self._begun and self._inner.query()

    def synchronize(self) -> None:
        self._inner.synchronize()


def bytes_behind_backward(patch: Patch) -> list[int]:
    """Return what was copied back and is still held when each unit's backward is over, last unit first."""
    module, lanes = chain(NUM_BLOCKS), ThreadLanes(CPU, None)
    begun: set[int] = set()
    found: list[tuple[int, weakref.ref[Any], int]] = []
    ends: list[Event] = []
    held: list[int] = []
    queue = lanes._queue

    def queued(on: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        ends.append(queue(on, copies, after, label))
        if label.name != "A" or on is not Lane.H2D:
            return ends[-1]
        targets = [copy.target for copy in copies]
        found.extend((label.unit, weakref.ref(target.untyped_storage()), target.nbytes) for target in targets)
        return _Late(ends[-1], label.unit, begun)

    def note(name: str, unit: int) -> None:
        if name == "B":
            held.append(sum(size for owner, ref, size in found if owner == unit and ref() is not None))

    patch.setattr(lanes, "_queue", queued)
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, NUM_BLOCKS)) as engine, engine.step("train"):
        loss = module(batches(1)[0]).sum()
        for end in ends:
            end.synchronize()
        bind = engine.binding.bind
        patch.setattr(engine.binding, "bind", lambda unit: (begun.add(unit.index), bind(unit)))
        engine.probes.on_boundary = note
        loss.backward()
    assert found
    assert len(held) == NUM_BLOCKS
    return held


def test_nothing_is_held_for_copies_once_backward_has_used_what_they_carried(monkeypatch: Patch) -> None:
    assert bytes_behind_backward(monkeypatch) == [0] * NUM_BLOCKS


def test_a_tensor_that_is_saved_twice_travels_once() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x * x + torch.sin(x) + torch.cos(x.view(-1)).view_as(x) * self.up.weight.sum()

    torch.manual_seed(0)
    module = Chain(0)
    module.blocks.extend(Twice() for _ in range(3))
    x = batches(1)[0].requires_grad_()
    lanes = ThreadLanes(CPU, None)
    with open_engine(module, lanes, k=3, choices=choices(Policy.OFFLOAD, 3)) as engine, engine.step("train"):
        module(x)
    # Of each of the two units before the last: x, and both operands of the product, of which one is a number.
    assert lanes.d2h_bytes == 2 * (2 * x.nbytes + 4)


def test_small_tensors_and_shared_ones_stay(monkeypatch: Patch) -> None:
    monkeypatch.setattr(offload_module, "MIN_BYTES", 10**6)
    module, lanes = chain(3), ThreadLanes(CPU, None)
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, 3)) as engine, engine.step("train"):
        module(batches(1)[0])
    assert lanes.d2h_bytes == 0


def test_an_activation_that_is_written_to_is_an_error_as_ever() -> None:
    class Exposes(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x)
            self.exposed = y
            return super().forward(y)

    module: Any = chain(3)
    module.blocks[1] = Exposes()
    lanes = ThreadLanes(CPU, None)
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, 3)) as engine, engine.step("train"):
        loss = module(batches(1)[0]).sum()
        with torch.no_grad():
            module.blocks[1].exposed.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*'blocks\.1'"):
            loss.backward()


def check_backward_after_the_session(tier: Tier | None = None) -> None:
    expected, module = chain(4), chain(4)
    expected(batches(1)[0]).pow(2).mean().backward()
    offloading = choices(Policy.OFFLOAD, 4)
    with open_engine(module, ThreadLanes(CPU, None), choices=offloading, tier=tier) as engine, engine.step("train"):
        loss = module(batches(1)[0]).pow(2).mean()
    loss.backward()
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_backward_after_the_session_reads_the_host() -> None:
    check_backward_after_the_session()


def test_weights_and_anchors_never_travel_as_activations() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(WIDTH, WIDTH, bias=False)
    module = Chain(3)
    for block in module.blocks:
        block.up = tied  # type: ignore[assignment]
        block.down = nn.Linear(WIDTH, WIDTH)  # type: ignore[assignment]
    lanes = ThreadLanes(CPU, None)
    sent: list[int] = []
    original = lanes.d2h

    def noting(copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        sent.extend(copy.source.untyped_storage().data_ptr() for copy in copies)
        return original(copies, after=after, label=label)

    lanes.d2h = noting  # type: ignore[method-assign]
    with open_engine(module, lanes, choices=choices(Policy.OFFLOAD, 3)) as engine, engine.step("train"):
        module(batches(1)[0])
        slots = {slot.address for slot in engine.slots.slots}
    assert sent
    assert tied.weight.untyped_storage().data_ptr() not in sent
    assert not slots & set(sent)


def test_offloading_waits_for_no_update_but_its_own_units():
    """Where tensors lie is asked in forward, while units further on are still being updated."""
    module = chain(NUM_BLOCKS)
    with open_engine(
        module, ThreadLanes(CPU, None, max_delay_ms=0.1), k=2, choices=choices(Policy.OFFLOAD, NUM_BLOCKS)
    ) as engine:
        stage = LateStage(engine)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        stage.attend([optimizer])
        waiting: list[int] = []
        module.blocks[1].register_forward_pre_hook(lambda *_: waiting.append(stage.lane.num_waiting))
        for x in batches(3):  # the first step makes the states, all at once
            with engine.step("train"):
                loss = module(x).pow(2).mean()
            loss.backward()
            optimizer.step()
        stage.close()
    assert waiting[2] >= 1
