from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe import CopyRate, MachineProfile, Route, UpdateRate, measure_machine
from lightning_superpipe.observe.measure import measure_copies, measure_updates
from lightning_superpipe.observe.rates import ComputeRate, DiskRoute, MemoryRate, Work
from tests.processes import run_code

CPU = torch.device("cpu")
PROFILE = MachineProfile(
    device="cuda:0",
    emulated=False,
    copies=(
        CopyRate(Route.H2D, True, 1 << 20, (1e-4, 2e-4, 3e-4)),
        CopyRate(Route.H2D, True, 1 << 30, (0.04, 0.02, 0.03)),
        CopyRate(Route.H2D, False, 1 << 30, (0.2,)),
        CopyRate(Route.BOTH, True, 1 << 30, (0.06,)),
    ),
    updates=(UpdateRate(1, 10**9, "float32", (0.5,)), UpdateRate(8, 10**9, "float32", (0.2, 0.1, 0.3))),
    versions={"torch": "2.13.0"},
)


def test_a_profile_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "machine.json")
    assert MachineProfile.load(tmp_path / "machine.json") == PROFILE


def test_rates_are_medians_and_both_ways_count_twice() -> None:
    assert PROFILE.copies[1].gb_s == pytest.approx(2**30 / 0.03 / 1e9)
    assert PROFILE.copies[3].gb_s == pytest.approx(2 * 2**30 / 0.06 / 1e9)
    assert PROFILE.updates[1].parameters_per_s == pytest.approx(5e9)


def test_the_link_is_the_best_of_all_sizes_and_none_if_not_measured() -> None:
    assert PROFILE.link_gb_s(Route.H2D) == PROFILE.copies[1].gb_s
    assert PROFILE.link_gb_s(Route.H2D, pinned=False) == PROFILE.copies[2].gb_s
    assert PROFILE.link_gb_s(Route.D2H) is None
    assert PROFILE.update_rate("float32") == PROFILE.update_rate("float32", num_threads=8)
    assert PROFILE.update_rate("float32", num_threads=1) == 2e9
    assert PROFILE.update_rate("bfloat16") is None


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in PROFILE.to_dict().items() if key != name}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        _without("copies"),
        {**PROFILE.to_dict(), "format": "lightning_superpipe.row"},
        {**PROFILE.to_dict(), "version": 1},
        {**PROFILE.to_dict(), "copies": [{"route": "sideways", "pinned": True, "num_bytes": 1, "seconds": [1.0]}]},
        {**PROFILE.to_dict(), "copies": [{"route": "h2d", "pinned": True, "num_bytes": 1, "seconds": []}]},
        {**PROFILE.to_dict(), "updates": [{"num_threads": 1, "num_parameters": 1, "dtype": "x", "seconds": [0.0]}]},
    ],
)
def test_anything_else_is_refused_with_the_file_and_the_way_out(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SuperpipeError, match=r"other\.json.*measure again"):
        MachineProfile.load(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SuperpipeError, match="not a machine profile"):
        MachineProfile.load(tmp_path / "broken.json")


def test_the_host_alone_is_measured_as_an_emulation_without_pinned_memory() -> None:
    threads = torch.get_num_threads()
    profile = measure_machine(CPU, copy_bytes=[1 << 10, 1 << 20], num_parameters=1000, threads=[1, 2], num_samples=2)
    assert (profile.device, profile.emulated) == ("cpu", True)
    asked = {(route, False, num_bytes) for route in Route for num_bytes in (1 << 10, 1 << 20)}
    assert {(copy.route, copy.pinned, copy.num_bytes) for copy in profile.copies} == asked
    assert {(update.dtype, update.num_threads) for update in profile.updates} == {
        (dtype, count) for dtype in ("float32", "bfloat16") for count in (1, 2)
    }
    assert all(len(rate.seconds) == 2 for rate in (*profile.copies, *profile.updates))
    assert torch.get_num_threads() == threads
    assert MachineProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.emu
@pytest.mark.parametrize("route", Route)
def test_copies_leave_nothing_on_the_device(route: Route, emu: torch.device) -> None:
    from tests.emu import used_bytes

    before = used_bytes()
    assert measure_copies(emu, route, 4096, pinned=False, num_samples=1).gb_s > 0
    assert used_bytes() == before


def test_updates_of_more_than_one_tensor_count_all_parameters() -> None:
    assert measure_updates(9 << 20, torch.float32, 1, num_samples=1).num_parameters == 8 << 20


def test_compute_memory_and_disk_are_measured_where_sizes_are_given(tmp_path: Path) -> None:
    said: list[str] = []
    profile = measure_machine(
        CPU,
        copy_bytes=[1 << 10],
        num_parameters=1000,
        threads=[1],
        widths=[16, 64],
        memory_bytes=[1 << 12, 1 << 16],
        disk=tmp_path,
        disk_bytes=[1 << 12, 5000],
        num_samples=2,
        say=said.append,
    )
    assert [(rate.dtype, rate.num_flops) for rate in profile.computes[:2]] == [("float32", 8192), ("float32", 524288)]
    assert {(rate.work, rate.num_bytes) for rate in profile.memory} == {
        (work, size) for work in Work for size in (1 << 12, 1 << 16)
    }
    assert {(rate.route, rate.num_bytes) for rate in profile.disks} == {
        (route, size) for route in DiskRoute for size in (1 << 12, 1 << 13)
    }
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"
    assert said and profile.launch_s > 0 and profile.room.host_total > profile.room.host_free > 0
    speeds = profile.speeds()
    assert speeds.disk_read is not None and speeds.disk_write is not None
    assert MachineProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_a_disk_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuperpipeError, match=r"nowhere.*cannot be measured"):
        measure_machine(
            CPU, copy_bytes=[1], num_parameters=1, threads=[1], disk=tmp_path / "nowhere", disk_bytes=[1], num_samples=1
        )


def test_speeds_come_from_pinned_copies_and_from_pageable_ones_where_there_are_none() -> None:
    pageable = tuple(
        CopyRate(route, False, size, (size / 1e9,)) for route in Route for size in (1 << 20, 1 << 24)
    )  # 1 GB/s
    pinned = tuple(CopyRate(copy.route, True, copy.num_bytes, (copy.num_bytes / 1e10,)) for copy in pageable)
    both = replace(PROFILE, copies=pageable + pinned)
    assert both.speeds().h2d.seconds(1 << 24) == pytest.approx((1 << 24) / 1e10)
    assert both.speeds(pinned=False).d2h.seconds(1 << 24) == pytest.approx((1 << 24) / 1e9)
    without = replace(PROFILE, copies=pageable, why_not_pinned="no allocator")
    assert without.speeds() == both.speeds(pinned=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU memory can be page-locked")
def test_this_machine_says_why_it_has_no_page_locked_memory(tmp_path: Path) -> None:
    code = (  # in a process of its own: the emulated device of other tests page-locks memory
        "import torch; from lightning_superpipe.observe import measure_machine\n"
        "cpu = torch.device('cpu')\n"
        "made = measure_machine(cpu, copy_bytes=[1024], num_parameters=10, threads=[1], num_samples=1)\n"
        "assert not any(copy.pinned for copy in made.copies)\n"
        "assert made.speeds() == made.speeds(pinned=False)\n"
        "try:\n"
        "    torch.empty(1, pin_memory=True)\n"
        "except RuntimeError as error:\n"  # builds differ in their words
        "    assert made.why_not_pinned.strip() and made.why_not_pinned.strip() in str(error), made.why_not_pinned\n"
        "    print('said')"
    )
    ran = run_code(code, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "said" in ran.stdout


def test_a_profile_without_copies_has_no_speeds() -> None:
    with pytest.raises(SuperpipeError, match=r"no copies from the device.*superpipe profile --again"):
        PROFILE.speeds()


def test_dtypes_answer_for_each_other_and_updates_follow_their_bytes() -> None:
    rates = (ComputeRate("float32", 100, (2.0,)), ComputeRate("float16", 100, (1.0,)))
    profile = replace(PROFILE, computes=rates, memory=(MemoryRate(100, (3.0,)),))
    for dtype, seconds in (("float32", 2.0), ("float16", 1.0), ("bfloat16", 1.0), ("float64", 2.0)):
        curve = profile.compute_curve(dtype)
        assert curve is not None and curve.seconds(100) == pytest.approx(seconds)
    draws = profile.memory_curve(Work.RANDOM)
    assert draws is not None and draws.seconds(100) == pytest.approx(3.0)
    assert profile.update_seconds("float32", 10**9) == pytest.approx(0.2)
    assert profile.update_seconds("float32", 7 * 10**9, num_states=0) == pytest.approx(0.6)
    assert PROFILE.compute_curve("float32") is None and PROFILE.memory_curve() is None
