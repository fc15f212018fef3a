"""Files in the plan: what stays in memory, and how long a step takes whose bytes cross a disk."""

from __future__ import annotations

import pytest

from lightning_superpipe.errors import BudgetError
from lightning_superpipe.planning.disk_tier import choose_files, with_files
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

SIZES = [30, 10, 20, 40, 10, 10]
NEED = HostNeed(weights=sum(SIZES) + 7, gradients=sum(SIZES), states=2 * sum(SIZES))
KINDS = [{"weights", "states"}, {"states"}, {"weights"}, {"weights", "states", "gradients"}]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("undo", [True, False])
def test_more_host_memory_keeps_more_units_and_is_never_exceeded(kinds: set[str], undo: bool) -> None:
    sized = {"streamed": sum(SIZES), "largest": max(SIZES), "undo": undo}
    kept = []
    for limit in range(0, 2500, 10):
        choice = choose_files(NEED, kinds, SIZES, ring=None, undo=undo, limit=limit)
        kept.append(len(choice.in_memory))
        size = sum(SIZES[unit] for unit in choice.in_memory)
        total = NEED.with_files(kinds, num_buffers=choice.ring, kept=size, **sized).total
        if choice.in_memory:
            assert total <= limit
            assert choice.in_memory_bytes > 0
    assert kept[0] == 0
    assert kept[-1] == len(SIZES)


def test_without_a_limit_nothing_stays_and_a_ring_that_was_asked_for_is_kept() -> None:
    assert choose_files(NEED, KINDS[0], SIZES, ring=None, undo=True, limit=None).in_memory == frozenset()
    assert choose_files(NEED, KINDS[0], SIZES, ring=7, undo=True, limit=10).ring == 7
    assert choose_files(NEED, {"gradients"}, SIZES, ring=None, undo=True, limit=10_000).in_memory == frozenset()


@pytest.mark.parametrize(
    ("kinds", "ways", "no_ways"),
    [
        (None, ["store='disk'"], ["disk.ring", "gradients: disk"]),
        ({"states"}, ["store='disk'", "disk.ring"], ["gradients: disk"]),
        ({"weights", "states"}, ["gradients: disk", "disk.ring"], ["store='disk'"]),
        ({"weights", "states", "gradients"}, ["disk.ring"], ["gradients: disk", "store='disk'"]),
    ],
)
def test_a_refusal_advises_what_is_not_done_yet(kinds: set[str] | None, ways: list[str], no_ways: list[str]) -> None:
    need = NEED
    if kinds is not None:
        need = NEED.with_files(kinds, streamed=sum(SIZES), largest=max(SIZES), num_buffers=3)
    with pytest.raises(BudgetError, match=f"training needs .*{need.total} bytes") as caught:
        need.check(available=0, limit=1)
    assert [way for way in (*ways, *no_ways) if way in str(caught.value)] == ways


@pytest.mark.parametrize("update", ["at_once", "after_backward", "in_backward"])
@pytest.mark.parametrize("kinds", KINDS[:3])
def test_step_takes_at_least_what_its_bytes_take_on_the_disk_but_for_those_still_in_memory(
    kinds: set[str], update: str
) -> None:
    unit = UnitWork("h", 10, 10, state_bytes=20, forward_s=1.0, backward_s=2.0, update_s=0.5)
    plain = Workload((unit,) * 6)
    speeds = Speeds(Curve.steady(100.0), Curve.steady(100.0), disk_read=Curve.steady(2.0), disk_write=Curve.steady(4.0))
    setting = Setting(k=2, update=update)
    moved, memory = (simulate(each, speeds, setting) for each in (with_files(plain, kinds), plain))
    updated = 10 * ("weights" in kinds) + 20 * ("states" in kinds)
    loads = moved.num_loads * 10 * ("weights" in kinds)
    all_s = (loads + 6 * updated) / 2.0 + 6 * updated / 4.0
    if update == "at_once" or "weights" not in kinds:
        assert moved.busy.disk == pytest.approx(all_s)
    else:  # each load of a forward may find what the update has left, each update what backward has
        assert all_s - 2 * 6 * 10 / 2.0 <= moved.busy.disk < all_s
    assert moved.busiest == "disk" or update == "at_once"  # which counts as compute
    assert moved.step_s >= moved.busy.disk
    assert memory.busy.disk == 0.0
    assert moved.host.total < memory.host.total
    half = simulate(with_files(plain, kinds, in_memory={0, 2, 4}), speeds, setting)
    assert half.step_s < moved.step_s
