"""Units updated on the device get the numbers of the ordinary optimizer, however late copies and threads are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.host_lane import HostEvent, Past
from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.engine.residency import Residency
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.optimizer import DeviceUpdates, UpdateStage
from lightning_superpipe.optimizer.device import Ending
from tests.engine.tiny import CPU, batches, chain, open_engine
from tests.optimizer.late_updates import LateStage
from tests.optimizer.test_stage import IN_BACKWARD, LOOPS, streams_to_the_same

Patch = pytest.MonkeyPatch


def on_device(share: float, stage: Callable[..., UpdateStage] = LateStage) -> Callable[[Engine], UpdateStage]:
    """A stage that updates a share of the units on the device."""

    def make(engine: Engine) -> UpdateStage:
        return stage(engine, device=DeviceUpdates(engine, share, has_masters=False, poison=True))

    return make


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("name", LOOPS)
def test_updates_on_the_device_leave_what_the_ordinary_optimizer_leaves(name: str, share: float) -> None:
    assert streams_to_the_same(LOOPS[name], stage_of=on_device(share))


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_updates_on_the_device_in_backward_leave_the_same(name: str) -> None:
    assert streams_to_the_same(LOOPS[name], in_backward=True, stage_of=on_device(0.5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_backward", [False, True])
def test_threads_at_random_moments_leave_the_same(in_backward: bool, seed: int) -> None:
    stage = partial(UpdateStage, max_delay_ms=2.0, seed=seed)
    assert streams_to_the_same(
        LOOPS["adamw"], in_backward=in_backward, stage_of=on_device(0.5, stage), max_delay_ms=2.0
    )


# -- the slots


class Turning(nn.Module):
    """Blocks that run in the opposite order in every third call, so that what lies in slots is not needed first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = chain(4).blocks
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        for block in self.blocks if self.num_calls % 3 else reversed(self.blocks):  # type: ignore[call-overload]
            x = block(x)
        return x


def turns_to_the_same(max_delay_ms: float = 0.0) -> bool:
    """Whether training leaves the ordinary weights where slots are given to others before anybody used the update."""
    plain, module = Turning(), Turning()
    for each in (plain, module):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        with contextlib.ExitStack() as stack:
            step: Any = contextlib.nullcontext
            if each is module:
                engine = stack.enter_context(open_engine(each, ThreadLanes(CPU, None, max_delay_ms=max_delay_ms)))
                updates = on_device(1.0)(engine)
                stack.callback(updates.close)
                updates.attend([optimizer])
                step = partial(engine.step, "train")
            for x in batches(6):
                with step():
                    loss = each(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return all(map(torch.equal, module.parameters(), plain.parameters()))


def test_slot_is_kept_until_its_update_is_over() -> None:
    assert turns_to_the_same(0.3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_units_updated_in_their_slots_are_not_loaded_again(k: int) -> None:
    num_units, module = 6, chain(6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    with open_engine(module, ThreadLanes(CPU, None, max_delay_ms=0.1), k=k) as engine:
        updates = on_device(0.5, UpdateStage)(engine)
        updates.attend([optimizer])
        loads = [0]
        for x in batches(4):
            with engine.step("train"):
                loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loads.append(engine.residency.num_loads)
        updates.close()
    assert loads[-1] - loads[-2] == 2 * num_units - 2 * k
    assert updates.device is not None and updates.device.num_units == 3


def test_scratch_is_taken_once() -> None:
    module = chain(4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    with open_engine(module, ThreadLanes(CPU, None, max_delay_ms=0.1)) as engine:
        updates = on_device(1.0, UpdateStage)(engine)
        updates.attend([optimizer])
        held, addresses = [], set()
        for x in batches(5):
            with engine.step("train"):
                loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for unit in engine.units:
                unit.settle()
            device = updates.device
            assert device is not None
            held.append(device.held_bytes)
            addresses |= {each._buffer.data_ptr() for each in device._scratch}
        updates.close()
    assert held[0] == 0 and set(held[1:]) == {2 * device.scratch_bytes}
    assert len(addresses) == 2


# -- each fence, taken away


def without_waiting_compute(patch: Patch) -> None:
    """Compute does not wait for the kernels that write to its slot."""
    update = Unit.update_in_slot
    patch.setattr(Unit, "update_in_slot", lambda self, pending, arrival: update(self, pending, Past()))


def without_arrival_at_home(patch: Patch) -> None:
    """Whoever waits for an update goes on when its kernels are done, before its weights are home."""
    carry = Lanes.carry

    def ends_early(self: Lanes, lane: Lane, copies: Any, *, label: Any) -> None:
        if lane is Lane.H2D:
            carry(self, lane, copies, label=label)

    patch.setattr(Lanes, "carry", ends_early)


def without_arrival_on_the_device(patch: Patch) -> None:
    """Kernels do not wait for what they work on."""
    carry = Lanes.carry

    def starts_early(self: Lanes, lane: Lane, copies: Any, *, label: Any) -> None:
        if lane is Lane.D2H:
            carry(self, lane, copies, label=label)

    patch.setattr(Lanes, "carry", starts_early)


@pytest.mark.parametrize("remove", [without_waiting_compute, without_arrival_at_home, without_arrival_on_the_device])
def test_numbers_are_wrong_without(remove: Callable[[Patch], None], monkeypatch: Patch) -> None:
    remove(monkeypatch)
    with contextlib.suppress(RuntimeError):  # or it is noticed
        assert not streams_to_the_same(LOOPS["adamw"], stage_of=on_device(1.0))


def test_numbers_are_wrong_where_slots_are_given_away_before_their_update_is_over(monkeypatch: Patch) -> None:
    evict = Residency.evict

    def at_once(self: Residency, unit: Unit) -> None:
        unit.in_slot = None
        evict(self, unit)

    monkeypatch.setattr(Residency, "evict", at_once)
    with contextlib.suppress(RuntimeError):  # or it is noticed
        assert not turns_to_the_same()


def test_kernels_wait_for_what_computes_with_the_slot(monkeypatch: Patch) -> None:
    module, gate = chain(3), HostEvent()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (x,) = batches(1)
    lanes = ThreadLanes(CPU, None, max_delay_ms=0.1)
    with open_engine(module, lanes) as engine:
        updates = on_device(1.0, UpdateStage)(engine)
        updates.attend([optimizer])
        with engine.step("train"):
            loss = module(x).square().mean()
        loss.backward()
        slot = engine.units[0].slot
        assert slot is not None
        before = slot.buffer.clone()
        monkeypatch.setattr(lanes, "compute_event", lambda: gate)
        optimizer.step()
        endings = [unit.pending.done for unit in engine.units if unit.pending is not None]
        assert len(endings) == 3 and not any(ending.query() for ending in endings)
        assert torch.equal(slot.buffer, before)
        gate.set()
        for ending in endings:
            assert isinstance(ending, Ending)
            ending.synchronize()
        assert not torch.equal(slot.buffer, before)
        updates.close()
