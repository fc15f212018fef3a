"""Activations in files, as a simulation sees them: bytes, bounds, and what a few buffers hold up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.planning.bounds import StepBounds
from lightning_superpipe.planning.disk_queue import DiskQueue
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.disk_work import DiskWork
from lightning_superpipe.planning.file_route import FileRoute
from lightning_superpipe.planning.link import Copying, Link
from lightning_superpipe.planning.need import ACTIVATION_BUFFERS, host_use
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

from .strategies import thorough
from .workloads import machine, problems

KINDS = [{"activations"}, {"weights", "activations"}, {"weights", "states", "activations"}]
ALL = ("offload",) * 6


def chain(num_units: int = 6, **work: float) -> Workload:
    sizes = {"activation_bytes": 8, "offload_bytes": 8, "input_bytes": 1, "forward_bytes": 8}
    times = {"forward_s": 2.0, "backward_s": 4.0} | work
    return Workload((UnitWork("h", 4, 4, 8, **times, **sizes),) * num_units)


def disk_of(read: float, write: float) -> Speeds:
    return machine(100.0, 100.0, disk_read=Curve.steady(read), disk_write=Curve.steady(write))


def offloaded(workload: Workload) -> Workload:
    return with_files(workload, {"activations"})


# -- the route alone


@thorough
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 4))
def test_no_more_is_under_way_than_buffers_hold(sizes: list[int], link_s: int, disk_s: int) -> None:
    speeds = machine(1 / link_s, 1 / link_s, disk_read=Curve.steady(1 / disk_s), disk_write=Curve.steady(1 / disk_s))
    link, disk = Link(speeds), DiskQueue(speeds, 3)
    there: list[tuple[float, Copying]] = []

    def to_device(size: int, ready_s: float) -> Copying:
        there.append((ready_s, link.copy(link.h2d, size, ready_s)))
        return there[-1][1]

    route = FileRoute(sizes, disk, link, lambda size, free_s: link.copy(link.d2h, size, free_s), to_device)
    homes = [link.end_s(route.send(index)) for index in range(len(sizes))]
    written = [homes[0] + sizes[0] * disk_s]  # one write after the other, each behind its copy
    for home, size in zip(homes[1:], sizes[1:], strict=True):
        written.append(max(written[-1], home) + size * disk_s)
    for before, home, size in zip(written, homes[ACTIVATION_BUFFERS:], sizes[ACTIVATION_BUFFERS:], strict=False):
        assert home >= before + size * link_s - 1e-6
    for index in reversed(range(len(sizes))):
        route.fetch(index, homes[-1])
        assert route.arrive(index) is there[-1][1]
    ends = [link.end_s(copying) for _, copying in there]
    for (read_s, _), index in zip(there, reversed(range(len(sizes))), strict=True):
        assert read_s >= written[index] + sizes[index] * disk_s - 1e-6
    for copied, (read_s, _), size in zip(
        ends, there[ACTIVATION_BUFFERS:], sizes[::-1][ACTIVATION_BUFFERS:], strict=False
    ):
        assert read_s >= copied + size * disk_s - 1e-6
    assert all(earlier < later for earlier, later in pairwise(ends))
    assert disk.work == DiskWork(sum(sizes), sum(sizes))


# -- steps


@pytest.mark.parametrize("setting", [Setting(k=2, activations=ALL), Setting(k=3, resident=1, activations=ALL)])
def test_files_that_cost_nothing_are_like_memory(setting: Setting) -> None:
    in_memory = simulate(chain(), disk_of(1e12, 1e12), setting)
    in_files = simulate(offloaded(chain()), disk_of(1e12, 1e12), setting)
    assert in_files.step_s == pytest.approx(in_memory.step_s, rel=1e-6)
    assert in_files.disk == DiskWork(4 * 8, 5 * 8)  # the last stays, the one before is not let go in time
    assert in_memory.disk == DiskWork()


def test_disk_that_nobody_has_measured_takes_no_time_and_is_counted() -> None:
    step = simulate(offloaded(chain()), machine(100.0, 100.0), Setting(k=2, activations=ALL))
    assert (step.busy.disk, step.disk.written_bytes) == (0.0, 40)


def test_slow_disk_sets_the_pace_and_a_fast_one_is_hidden() -> None:
    setting = Setting(k=2, activations=ALL)
    compute_s = simulate(chain(), disk_of(1e12, 1e12), setting).busy.compute
    slow, fast = (simulate(offloaded(chain()), disk_of(rate, rate), setting) for rate in (0.5, 50.0))
    assert slow.step_s > slow.busy.disk * 0.999 > 72 / 0.5 * 0.8
    assert slow.busiest == "disk"
    assert fast.step_s < 1.05 * compute_s


def test_buffers_are_all_that_files_leave_in_host_memory() -> None:
    setting = Setting(k=2, activations=ALL)
    assert host_use(chain(), setting).activations == 5 * 8
    assert host_use(offloaded(chain()), setting).activations == ACTIVATION_BUFFERS * 8
    assert host_use(offloaded(chain()), Setting(k=2)).activations == 0
    everything = with_files(chain(), {"weights", "states", "gradients", "activations"})
    assert host_use(replace(everything, staging_bytes=5), Setting(k=2)).total == 5


@thorough
@given(problems(), st.sampled_from(KINDS), st.sampled_from([0.5, 3.0, 50.0]))
def test_no_step_is_faster_than_its_bounds_nor_moves_other_bytes(
    problem: tuple[Workload, Setting], kinds: set[str], rate: float
) -> None:
    workload, setting = problem
    workload, speeds = with_files(workload, kinds), disk_of(rate, 2 * rate)
    step = simulate(workload, speeds, setting)
    assert step.step_s >= StepBounds(workload, speeds).seconds(setting) - 1e-6
    waited = step.stall_s if setting.update != "at_once" else step.stall_s - step.busy.host
    if not workload.has_stored_units:
        assert step.step_s == pytest.approx(step.busy.compute + waited, abs=1e-6)
    trained = [unit for index, unit in enumerate(workload.units) if index >= workload.lowest and unit.gradient_bytes]
    sent = [
        unit.offload_bytes
        for index, unit in enumerate(workload.units[:-1])
        if index >= workload.lowest and setting.policy(index) == "offload"
    ]
    assert step.disk.written_bytes == pytest.approx(sum(sent) + sum(unit.disk_write_bytes for unit in trained), abs=1)
