"""Each fence of a change-over holds under the worst timing, and without it the same timing shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.residency import Residency
from lightning_superpipe.engine.slots import SlotPool
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.planning.workload import Setting
from tests.engine.late_lanes import LateLanes
from tests.engine.tiny import CPU, batches, chain, open_engine, train

NUM_BLOCKS = 6
ORDER = tuple(range(NUM_BLOCKS))
ARRIVALS_FIRST = (Lane.H2D, Lane.COMPUTE, Lane.D2H)
COMPUTE_FIRST = (Lane.COMPUTE, Lane.D2H, Lane.H2D)
Patch = pytest.MonkeyPatch
Removal = Callable[[Patch], None]

pytestmark = pytest.mark.usefixtures("everything_travels")


def without_recovery(patch: Patch) -> None:
    """A backward pass that raised is not put in order first."""
    patch.setattr(Engine, "recover", lambda self: None)


def without_wait_for_loads(patch: Patch) -> None:
    """Slots are given up while a copy that nobody has used still writes to them."""
    patch.setattr(Residency, "fence_host_reads", lambda self: None)


def without_wait_for_compute(patch: Patch) -> None:
    """New slots take copies at once, whatever still computes in the memory that the allocator gave them."""
    extend = SlotPool.extend

    def unfenced(self: SlotPool, count: int, **_: Any) -> None:
        extend(self, count, free_after=None)  # type: ignore[arg-type]

    patch.setattr(SlotPool, "extend", unfenced)


def without_eviction(patch: Patch) -> None:
    """Units that lie in slots to be given up stay there."""
    patch.setattr(Residency, "evict", lambda self, unit: None)


def without_moved_twins(patch: Patch) -> None:
    """Twins go on pointing at slots that are given up."""
    shrink = Residency.shrink

    def unfenced(self: Residency, num_slots: int) -> None:
        with pytest.MonkeyPatch.context() as inner:  # loads move twins as well
            inner.setattr(self, "_move_twins", lambda unit, slot: None)
            shrink(self, num_slots)

    patch.setattr(Residency, "shrink", unfenced)


def is_whole_after_an_error(patch: Patch) -> bool:
    """As on a device whose autograd thread is still unwinding when the error arrives."""
    module = chain(NUM_BLOCKS)
    hosts = list(module.parameters())
    with open_engine(module, ThreadLanes(CPU, None), k=4) as engine:
        patch.setattr("lightning_superpipe.engine.engine.call_at_end", lambda engine, task: None)

        def fail(_: Tensor) -> None:
            raise ValueError("as asked")

        with engine.step("train"):
            x = batches(1)[0]
            for index, block in enumerate(module.blocks):
                x = block(x)
                if index == 1:
                    x.register_hook(fail)  # type: ignore[no-untyped-call]
            loss = x.sum()
        with pytest.raises(ValueError, match="as asked"):
            loss.backward()
        engine.adopt(Setting(1), ORDER)
        return all(found is host for found, host in zip(module.parameters(), hosts, strict=True))


def nothing_writes_to_freed_memory(patch: Patch) -> bool:
    lanes = LateLanes(CPU, COMPUTE_FIRST)
    with open_engine(chain(NUM_BLOCKS), lanes, k=4, poison=False) as engine:
        with engine.step("train"):
            pass  # its loads have been asked for, and nobody uses them
        engine.adopt(Setting(1), ORDER)
        lanes.run_until(lanes.submit(Lane.H2D, lambda: None, ()))
        return not lanes.stray_writes


def copies_wait_for_compute(patch: Patch) -> bool:
    lanes, has_computed = LateLanes(CPU, ARRIVALS_FIRST), []
    with open_engine(chain(NUM_BLOCKS), lanes, k=1, poison=False) as engine:
        lanes.submit(Lane.COMPUTE, lambda: has_computed.append(True), ())
        engine.adopt(Setting(4), ORDER)
        with engine.step("train"):
            arrivals = [unit.arrival for unit in engine.units[1:4]]
        for arrival in arrivals:
            assert arrival is not None
        arrivals[0].synchronize()  # type: ignore[union-attr]
        return bool(has_computed)


def window_is_as_small_as_asked(patch: Patch) -> bool:
    module = chain(NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), k=6) as engine:
        with engine.step("train"):
            module(batches(1)[0])
        engine.adopt(Setting(2), ORDER)
        return len(engine.slots.slots) == 2


def memory_is_let_go(patch: Patch) -> bool:
    module = chain(NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), k=6) as engine:
        train(module, batches(1), lambda: engine.step("train"))
        storages: list[Any] = [slot.buffer.untyped_storage() for slot in engine.slots.slots]
        refs = [storage._weak_ref() for storage in storages]
        storages.clear()
        engine.adopt(Setting(2), ORDER)
        held: Any = torch.UntypedStorage
        num_alive = sum(not held._expired(ref) for ref in refs)
        for ref in refs:
            held._free_weak_ref(ref)
        return num_alive == 2


FENCES: list[tuple[Removal, Callable[[Patch], bool]]] = [
    (without_recovery, is_whole_after_an_error),
    (without_wait_for_loads, nothing_writes_to_freed_memory),
    (without_wait_for_compute, copies_wait_for_compute),
    (without_eviction, window_is_as_small_as_asked),
    (without_moved_twins, memory_is_let_go),
]


@pytest.mark.parametrize("promise", [promise for _, promise in FENCES])
def test_promise_is_kept(promise: Callable[[Patch], bool], monkeypatch: Patch) -> None:
    assert promise(monkeypatch)


@pytest.mark.parametrize(("remove", "promise"), FENCES)
def test_promise_is_broken_without_its_fence(
    remove: Removal, promise: Callable[[Patch], bool], monkeypatch: Patch
) -> None:
    with monkeypatch.context() as patch:
        remove(patch)
        assert not promise(patch)
