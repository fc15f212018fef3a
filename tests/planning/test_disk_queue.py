"""The simulated disk: what shares it, what waits for what, and what needs no read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.planning.disk_queue import DiskQueue
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

RATE = Curve.steady(1.0)
FAST = Curve.steady(1e9)


def unit(weights: int = 1, states: int = 2, update_s: float = 0.0) -> UnitWork:
    moved = weights + states
    return UnitWork(
        "h", weights, update_s=update_s, disk_read_bytes=weights, disk_update_bytes=moved, disk_write_bytes=moved
    )


def disk(num_places: int = 3) -> DiskQueue:
    return DiskQueue(Speeds(FAST, FAST, disk_read=RATE, disk_write=RATE), num_places)


def test_reads_and_writes_at_once_share_the_disk() -> None:
    queue = disk()
    first, second = (queue.update(index, index, 0.0, unit()) for index in range(2))
    # R0 0-3; W0 and R1 share 3-9; W1 9-12.
    assert (queue.end_s(first), queue.end_s(second), queue.busy_s) == (9.0, 12.0, 12.0)


def test_updates_wait_for_a_place() -> None:
    queue = disk(num_places=1)
    first, second = (queue.update(index, index, 0.0, unit(update_s=1.0)) for index in range(2))
    assert (queue.end_s(first), queue.end_s(second)) == (7.0, 14.0)


def test_updates_are_read_in_the_order_of_need() -> None:
    queue = disk(num_places=1)
    late, early, urgent = (queue.update(rank, rank, ready, unit()) for rank, ready in ((2, 0.0), (1, 1.0), (0, 2.0)))
    assert queue.end_s(late) < queue.end_s(urgent) < queue.end_s(early)


@pytest.mark.parametrize(("between", "seconds"), [(0, 0.0), (2, 0.0), (3, 1.0)])
def test_weights_are_in_memory_until_their_place_is_taken(between: int, seconds: float) -> None:
    queue = disk(num_places=3)
    updates = [queue.update(index, index, 0.0, unit()) for index in range(1 + between)]
    over_s = max(map(queue.end_s, updates))
    assert queue.end_s(queue.load(0, over_s, unit())) == over_s + seconds


def test_what_an_update_leaves_serves_one_load() -> None:
    queue = disk()
    over_s = queue.end_s(queue.update(0, 0, 0.0, unit()))
    first, second = (queue.end_s(queue.load(0, over_s, unit())) for _ in range(2))
    assert (first, second) == (over_s, over_s + 1.0)


def test_weights_are_loaded_from_memory_while_their_file_is_written() -> None:
    queue = disk()
    update = queue.update(0, 0, 0.0, unit(update_s=1.0))
    load = queue.load(0, 0.0, unit())
    assert (queue.end_s(load), queue.end_s(update)) == (4.0, 7.0)


def test_weights_that_were_kept_are_not_read_for_their_update() -> None:
    queue = disk(num_places=2)
    for index in range(3):
        queue.keep(index, 0.0)  # the first has to make room
    ends = [queue.end_s(queue.update(index, index, 100.0 * index, unit())) for index in range(3)]
    assert ends == [6.0, 105.0, 205.0]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3), st.integers(0, 20)), min_size=1),
    st.integers(1, 4),
)
def test_nothing_is_over_before_its_work_is_done(jobs: list[tuple[int, int, int, int]], num_places: int) -> None:
    queue = disk(num_places)
    updates, loads, work_s = [], [], 0.0
    for index, (weights, states, update_s, ready_s) in enumerate(jobs):
        work = unit(weights, states, update_s)
        updates.append(queue.update(index, index, ready_s, work))
        loads.append(queue.load(index, ready_s, work))
        work_s += 2 * (weights + states)
        changed_s = ready_s + weights + states + update_s
        assert queue.end_s(loads[-1]) >= changed_s - 1e-6
        assert queue.end_s(updates[-1]) >= changed_s + weights + states - 1e-6
    assert max(map(queue.end_s, [*loads, *updates])) >= queue.busy_s - 1e-6
    assert queue.busy_s >= work_s - 1e-6


def chain(num_units: int, update_s: float = 0.01) -> Workload:
    one = UnitWork("h", 8, 8, 16, forward_s=1.0, backward_s=2.0, update_s=update_s)
    return Workload((one,) * num_units, between_s=0.1)


def step_s(workload: Workload, rate: float, update: str, ring: int = 3) -> float:
    speeds = Speeds(FAST, FAST, disk_read=Curve.steady(rate), disk_write=Curve.steady(rate))
    return simulate(with_files(workload, {"weights", "states"}, ring=ring), speeds, Setting(k=2, update=update)).step_s


@pytest.mark.parametrize("update", ["at_once", "after_backward", "in_backward"])
def test_disk_that_costs_nothing_changes_nothing(update: str) -> None:
    alone = simulate(chain(12), Speeds(FAST, FAST), Setting(k=2, update=update)).step_s
    assert step_s(chain(12), 1e12, update) == pytest.approx(alone, rel=1e-3)


def test_slow_disk_sets_the_pace_and_a_fast_one_is_hidden() -> None:
    compute_s = 12 * 3.0
    for rate in (1.0, 10.0, 40.0, 1000.0):
        in_backward, after, at_once = (
            step_s(chain(12), rate, update) for update in ("in_backward", "after_backward", "at_once")
        )
        most_s = compute_s + 0.3 + 12 * (2 * 8 + 2 * 24) / rate
        assert compute_s < in_backward <= after * 1.01 <= at_once * 1.02 <= most_s * 1.03
    assert step_s(chain(12), 1000.0, "in_backward") < 1.02 * compute_s
    assert step_s(chain(12), 1.0, "in_backward") > 12 * 48


def test_units_in_memory_are_not_read() -> None:
    files = with_files(chain(6), {"weights", "states"}, range(6))
    assert files.units == chain(6).units
    assert replace(files, ring=3) == chain(6)
