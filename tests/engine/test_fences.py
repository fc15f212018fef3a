"""Each fence holds under the worst timing, and without it the same timing gives wrong numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.host_lane import HostEvent, HostLane
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.residency import Residency
from lightning_superpipe.engine.slots import Slot, SlotPool
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe.trace import Lane
from tests.engine.held_lanes import HeldLanes
from tests.engine.late_lanes import LANE_ORDERS, LaneOrder, LateCompute, LateLanes
from tests.engine.tiny import CPU, WIDTH, Result, batches, chain, is_equal, open_engine, train

WINDOWS = ((2, 1), (3, 2), (1, 1), (9, 3))
COMPUTE_FIRST: LaneOrder = (Lane.COMPUTE, Lane.H2D, Lane.D2H)
ARRIVALS_FIRST: LaneOrder = (Lane.H2D, Lane.COMPUTE, Lane.D2H)
GRADIENTS_FIRST: LaneOrder = (Lane.D2H, Lane.COMPUTE, Lane.H2D)


@cache
def reference() -> Result:
    return train(chain(4, dropout=0.1), batches(2))


def train_late(order: LaneOrder | int, *, k: int = 2, k_prime: int = 1) -> Result:
    """Train on a device that computes asynchronously."""
    module, lanes = chain(4, dropout=0.1), LateLanes(CPU, order)
    # No poison: its kernel would run at once, before the compute that is queued on the slot.
    with open_engine(module, lanes, k=k, k_prime=k_prime, poison=False) as engine:
        lanes.attend(engine.gradients)
        return train(module, batches(2), partial(engine.step, "train"), partial(LateCompute, lanes, engine.slots))


def train_held(held: Lane) -> Result:
    """Train with copy threads, the copies of one direction as late as can be."""
    module, lanes = chain(4, dropout=0.1), HeldLanes(CPU, held)
    with open_engine(module, lanes) as engine:
        lanes.attend(engine.gradients)
        return train(module, batches(2), partial(engine.step, "train"))


def _name(value: object) -> str:
    return getattr(value, "__name__", None) or str(value)


# -- with all fences


@pytest.mark.parametrize(("k", "k_prime"), WINDOWS[:2])
@pytest.mark.parametrize("order", LANE_ORDERS, ids=lambda order: "-".join(lane.value for lane in order))
def test_every_order_of_lanes_gives_the_same_numbers(order: LaneOrder, k: int, k_prime: int) -> None:
    assert is_equal(train_late(order, k=k, k_prime=k_prime), reference())


@pytest.mark.parametrize("seed", range(8))
def test_random_interleavings_give_the_same_numbers(seed: int) -> None:
    k, k_prime = WINDOWS[seed % len(WINDOWS)]
    assert is_equal(train_late(seed, k=k, k_prime=k_prime), reference())


@pytest.mark.parametrize("held", [Lane.H2D, Lane.D2H], ids=str)
def test_copy_threads_may_be_as_late_as_they_like(held: Lane) -> None:
    assert is_equal(train_held(held), reference())


@pytest.mark.parametrize(("k", "k_prime"), WINDOWS)
def test_randomly_late_copy_threads_give_the_same_numbers(k: int, k_prime: int) -> None:
    module = chain(4, dropout=0.1)
    lanes = ThreadLanes(CPU, None, max_delay_ms=1.0, seed=k)
    with open_engine(module, lanes, k=k, k_prime=k_prime, seed=k) as engine:
        assert is_equal(train(module, batches(2), partial(engine.step, "train")), reference())


# -- without one of them

Patch = pytest.MonkeyPatch


def without_arrival(patch: Patch) -> None:
    """Compute does not wait for the copy of its weights."""
    for lanes in (LateLanes, HeldLanes):
        patch.setattr(lanes, "compute_waits", lambda self, event, unit: None)


def without_slot_fence(patch: Patch) -> None:
    """A copy into a slot does not wait for the compute that reads the slot."""
    give_back = SlotPool.give_back

    def unfenced(self: SlotPool, slot: Slot, compute_event: Callable[[], Event]) -> None:
        give_back(self, slot, compute_event)
        slot.free_after = None

    patch.setattr(SlotPool, "give_back", unfenced)


def without_ready_gradient(patch: Patch) -> None:
    """A gradient's copy does not wait for the compute that makes it."""
    d2h = Lanes.d2h

    def unfenced(self: Lanes, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        return d2h(self, copies, after=(), label=label)

    patch.setattr(Lanes, "d2h", unfenced)


def without_held_gradient(patch: Patch) -> None:
    """Nobody holds a gradient until its copy is done."""
    submit = HostLane.submit

    def holding_nothing(
        self: HostLane, job: Callable[[], None], *, after: Event, done: HostEvent | None = None
    ) -> HostEvent:
        assert isinstance(job, partial)
        batch, label = job.args
        batch = [each._replace(gradient=SimpleNamespace(nbytes=each.gradient.nbytes)) for each in batch]
        return submit(self, partial(job.func, batch, label), after=after)

    patch.setattr(HostLane, "submit", holding_nothing)


def without_landing(patch: Patch) -> None:
    """Backward ends before the gradients have landed."""
    patch.setattr(GradientReturn, "finish", lambda self: None)


class Removal(NamedTuple):
    """A fence taken away, and the order of lanes that shows it."""

    remove: Callable[[Patch], None]
    order: LaneOrder

    def __str__(self) -> str:
        return self.remove.__name__


REMOVALS = [
    Removal(without_arrival, COMPUTE_FIRST),
    Removal(without_slot_fence, ARRIVALS_FIRST),
    Removal(without_ready_gradient, GRADIENTS_FIRST),
    Removal(without_held_gradient, COMPUTE_FIRST),
    Removal(without_landing, COMPUTE_FIRST),
]


@pytest.mark.parametrize("removal", REMOVALS, ids=str)
def test_numbers_are_wrong(removal: Removal, monkeypatch: Patch) -> None:
    removal.remove(monkeypatch)
    assert not is_equal(train_late(removal.order), reference())


@pytest.mark.parametrize(("remove", "held"), [(without_arrival, Lane.H2D), (without_landing, Lane.D2H)], ids=_name)
def test_numbers_of_copy_threads_are_wrong(remove: Callable[[Patch], None], held: Lane, monkeypatch: Patch) -> None:
    remove(monkeypatch)
    assert not is_equal(train_held(held), reference())


# -- the host writes to weights that a copy still reads


def forward_then_update(update: Callable[[Any], None]) -> bool:
    """Whether a forward, queued before an update of the host's weights, computes with the weights before it."""
    x = batches(1)[0]
    module = chain(3)
    expected = module(x)
    lanes = LateLanes(CPU, COMPUTE_FIRST)
    with open_engine(module, lanes, k=3, poison=False) as engine, engine.step("train"), torch.no_grad():
        with LateCompute(lanes, engine.slots):
            y = module(x)
        update(module)
        lanes.finish()
        return torch.equal(y, expected)


def step_of_optimizer(module: Any) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), fused=True).step()


def write_through_data(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(2)


def write_in_place(module: Any) -> None:
    for parameter in module.parameters():
        parameter.mul_(2)


UPDATES = [step_of_optimizer, write_through_data, write_in_place]


@pytest.mark.parametrize("update", UPDATES, ids=_name)
def test_host_weights_are_written_only_after_copies_have_read_them(update: Callable[[Any], None]) -> None:
    assert forward_then_update(update)


@pytest.mark.parametrize("update", UPDATES, ids=_name)
def test_weights_are_torn_without_that_fence(update: Callable[[Any], None], monkeypatch: Patch) -> None:
    monkeypatch.setattr(Residency, "fence_host_reads", lambda self: None)
    assert not forward_then_update(update)


def test_evaluation_ends_only_after_copies_have_read_host_weights(monkeypatch: Patch) -> None:
    # The plan of a repeated forward prefetches for the next one; the program may write to weights before it comes.
    module, lanes = chain(5), LateLanes(CPU, COMPUTE_FIRST)
    with open_engine(module, lanes, k=2, poison=False) as engine:
        with engine.step("validate", is_undisturbed=True), torch.no_grad():
            module(batches(1)[0])
        assert all(not queue for lane, queue in lanes._queues.items() if lane is Lane.H2D)
        monkeypatch.setattr(Residency, "fence_host_reads", lambda self: None)
        with engine.step("validate", is_undisturbed=True), torch.no_grad(), LateCompute(lanes, engine.slots):
            module(batches(1)[0])
        assert lanes._queues[Lane.H2D]


# -- memory


def test_nothing_is_copied_into_memory_that_has_been_freed() -> None:
    """A unit that grows gets larger slots, while prefetches into the old ones are still on their way."""
    module, lanes = chain(4), LateLanes(CPU, COMPUTE_FIRST)
    with open_engine(module, lanes, k=3, poison=False) as engine:
        with engine.step("train"):
            pass  # a batch that the user skips: what was prefetched for it is never used
        module.blocks[0].late = nn.Linear(WIDTH, 8 * WIDTH)
        with engine.step("train"), torch.no_grad(), LateCompute(lanes, engine.slots):
            module(batches(1)[0])
        lanes.finish()
    assert not lanes.stray_writes


def test_slot_is_free_only_after_its_poison_is_written() -> None:
    """On an accelerator the poison is one more kernel: a copy that does not wait for it is poisoned too."""
    poisoned: list[bool] = []

    class Noting(ThreadLanes):
        def compute_event(self) -> Event:
            poisoned.append(bool(slot.buffer.eq(255).all()))
            return super().compute_event()

    with open_engine(chain(2), Noting(CPU, None), k=1) as engine:
        slot, unit = engine.slots.slots[0], engine.units[0]
        engine.residency.require(unit)
        engine.residency.evict(unit)
        assert poisoned[-1:] == [True]


# -- anchors


def use_anchor_around(update: Callable[[Engine, nn.Parameter], None], order: LaneOrder | int) -> bool:
    """Whether compute sees an anchor as it was when the compute was queued, before and after an update at home."""
    module, x, lanes = chain(2), batches(1)[0], LateLanes(CPU, order)
    weight: nn.Parameter = module.get_parameter("blocks.0.up.weight")
    results = []
    with open_engine(module, lanes, poison=False) as engine, torch.no_grad():
        expected = [x @ weight.t(), x @ (2 * weight).t()]
        for is_first in (True, False):
            with LateCompute(lanes, engine.slots):
                results.append(x @ engine.anchors.twin(weight).t())
            if is_first:
                update(engine, weight)
        lanes.finish()
    return all(map(torch.equal, results, expected))


def double_once_read(engine: Engine, weight: nn.Parameter) -> None:
    """Update at home; the first copy has read home by then, but what computes with it is still queued."""
    assert engine.anchors.last_copy is not None
    engine.anchors.last_copy.synchronize()
    weight.mul_(2)


def double_by_optimizer(engine: Engine, weight: nn.Parameter) -> None:
    """Update at home as an optimizer does; nobody but the engine sees to it that the first copy has read home."""
    weight.grad = -weight.detach()
    torch.optim.SGD([weight], lr=1.0).step()


@pytest.mark.parametrize("order", [*LANE_ORDERS, 0, 1], ids=str)
def test_refreshing_an_anchor_waits_for_what_computes_with_it(order: LaneOrder | int) -> None:
    assert use_anchor_around(double_once_read, order)


def without_readers(patch: Patch) -> None:
    """A copy into an anchor does not wait for compute that reads the anchor."""
    h2d = Lanes.h2d

    def unfenced(self: Lanes, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        return h2d(self, copies, after=(), label=label)

    patch.setattr(Lanes, "h2d", unfenced)


@pytest.mark.parametrize(
    "removal", [Removal(without_readers, ARRIVALS_FIRST), Removal(without_arrival, COMPUTE_FIRST)], ids=Removal.__str__
)
def test_anchors_are_torn_without_fences(removal: Removal, monkeypatch: Patch) -> None:
    removal.remove(monkeypatch)
    assert not use_anchor_around(double_once_read, removal.order)


def test_optimizer_waits_for_the_copies_of_anchors() -> None:
    assert use_anchor_around(double_by_optimizer, COMPUTE_FIRST)
