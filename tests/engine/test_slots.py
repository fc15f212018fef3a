"""Slots: one buffer each, views of it, who still holds it, what becomes of it."""

from __future__ import annotations

import pytest
import torch

from lightning_superpipe.engine.slots import ALIGNMENT, SlotPool, storage_key, storage_use_count
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import PlanError
from tests.engine.tiny import CPU

SLOT_BYTES = 2 * ALIGNMENT


def pool_of(k: int, *, poison: bool = True, seed: int | None = None) -> SlotPool:
    return SlotPool(CPU, k, SLOT_BYTES, poison=poison, seed=seed)


past = ThreadLanes(CPU, None).compute_event


def test_slots_are_taken_in_order_until_none_is_free() -> None:
    pool = pool_of(3)
    slots = [pool.take(unit) for unit in (7, 8, 9)]
    assert [(slot.index, slot.tenant) for slot in slots] == [(0, 7), (1, 8), (2, 9)]
    assert pool.num_free == 0
    with pytest.raises(PlanError, match=r"unit 5.*3 are taken"):
        pool.take(5)
    pool.give_back(slots[1], past)
    assert pool.take(5) is slots[1]


def test_seed_shuffles_slots_the_same_way_each_time() -> None:
    def order(seed: int) -> list[int]:
        pool = pool_of(8, seed=seed)
        return [pool.take(unit).index for unit in range(8)]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(6)}) > 3
    assert sorted(order(1)) == list(range(8))


def test_free_slots_hold_nan_if_poisoned() -> None:
    pool = pool_of(1)
    slot = pool.take(0)
    view = slot.view(torch.float32, 0, torch.Size((4,)), (1,))
    assert view.isnan().all(), "before the first unit too"
    view.fill_(1.0)
    pool.give_back(slot, past)
    assert view.isnan().all()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        assert slot.view(dtype, 0, torch.Size((4,)), (1,)).isnan().all()


def test_slots_keep_their_bytes_if_not_poisoned() -> None:
    pool = pool_of(1, poison=False)
    slot = pool.take(0)
    view = slot.view(torch.float32, 0, torch.Size((4,)), (1,)).fill_(1.0)
    pool.give_back(slot, past)
    assert view.eq(1).all()


def test_given_back_slot_remembers_what_still_computes_on_it() -> None:
    pool, event = pool_of(1), past()
    slot = pool.take(0)
    assert slot.free_after is None
    pool.give_back(slot, lambda: event)
    assert slot.free_after is event
    assert slot.tenant is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.int8])
def test_view_has_the_layout_asked_for_and_lies_in_the_slot(dtype: torch.dtype) -> None:
    pool = pool_of(2)
    slot = pool.take(0)
    view = slot.view(dtype, ALIGNMENT, torch.Size((2, 3)), (1, 2))
    assert (view.dtype, view.size(), view.stride()) == (dtype, torch.Size((2, 3)), (1, 2))
    assert view.data_ptr() == slot.address + ALIGNMENT
    assert pool.of(view) is slot
    assert pool.of(view[:1].t()) is slot
    assert pool.of(torch.zeros(2)) is None
    assert pool.of(torch.zeros(2).to_sparse()) is None
    assert pool.of(torch.zeros(2, device="meta")) is None


def test_empty_and_zero_dimensional_views() -> None:
    slot = pool_of(1).take(0)
    assert slot.view(torch.float32, SLOT_BYTES, torch.Size((0, 4)), (4, 1)).numel() == 0
    assert slot.view(torch.float32, 0, torch.Size(()), ()).dim() == 0


def test_foreign_view_is_noticed_and_twins_are_not() -> None:
    slot = pool_of(1).take(0)
    assert not slot.has_escaped
    twin = torch.nn.Parameter(torch.empty(0))
    twin.data = slot.view(torch.float32, 0, torch.Size((4,)), (1,))
    assert slot.has_escaped, "a twin that nobody has counted"
    slot.num_twins = 1
    assert not slot.has_escaped
    temporary = slot.view(torch.float32, 0, torch.Size((4,)), (1,)) * 2
    assert not slot.has_escaped, "a result is not a view"
    view = twin.detach()[1:]
    assert slot.has_escaped
    del view, temporary
    assert not slot.has_escaped


def test_abandoned_buffer_stays_with_its_holder() -> None:
    pool = pool_of(1)
    slot = pool.take(0)
    view = slot.view(torch.float32, 0, torch.Size((4,)), (1,)).fill_(3.0)
    pool.abandon_storage(slot)
    assert pool.num_escapes == 1
    assert pool.of(view) is None
    assert pool.of(slot.buffer) is slot
    assert not slot.has_escaped
    pool.give_back(slot, past)
    assert view.eq(3).all()
    assert pool.num_bytes == SLOT_BYTES


def test_resize_gives_every_slot_new_memory() -> None:
    pool = pool_of(2)
    old = [slot.address for slot in pool.slots]
    pool.resize(3 * SLOT_BYTES)
    assert pool.num_bytes == 6 * SLOT_BYTES
    assert [slot.buffer.numel() for slot in pool.slots] == [3 * SLOT_BYTES] * 2
    assert all(pool.of(slot.buffer) is slot for slot in pool.slots)
    assert all(slot.address not in old and not slot.has_escaped for slot in pool.slots)
    assert pool.num_free == 2


def test_closed_pool_holds_nothing() -> None:
    pool = pool_of(2)
    buffer = pool.slots[0].buffer
    uses = storage_use_count(buffer)
    pool.take(0)
    pool.close()
    assert pool.num_bytes == 0
    assert pool.num_free == 0
    assert pool.of(buffer) is None
    assert storage_use_count(buffer) <= uses


def test_storage_key_and_use_count_follow_views() -> None:
    base = torch.zeros(4)
    assert storage_key(base) == storage_key(base[1:])
    assert storage_key(base) != storage_key(torch.zeros(4))
    uses = storage_use_count(base)
    view = base[1:]
    assert storage_use_count(base) == uses + 1
    del view
    assert storage_use_count(base) == uses
