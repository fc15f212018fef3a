"""What was measured of a machine completes what a run's own first steps have seen of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe import attach
from lightning_superpipe.config import Link
from lightning_superpipe.errors import SuperpipeWarning
from lightning_superpipe.observe import MachineProfile, identify, keep_profile
from lightning_superpipe.observe.profiles import CACHE_VARIABLE
from lightning_superpipe.observe.rates import CopyRate, Route
from lightning_superpipe.observe.step_times import speeds_of
from lightning_superpipe.observe.trace import Lane, Span
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.workload import Curve, Speeds

WIDTH, NUM_BLOCKS = 32, 6
MACHINE = Speeds(h2d=Curve(((10, 1.0), (1000, 2.0), (4000, 8.0))), d2h=Curve.steady(100.0), both=Curve.steady(50.0))


def copied(lane: Lane, start_s: float, end_s: float, num_bytes: int) -> Span:
    return Span(lane, "P", 0, start_s, end_s, num_bytes)


def test_sizes_that_a_run_has_not_copied_are_as_far_off_as_those_it_has() -> None:
    found = speeds_of([copied(Lane.H2D, 0.0, 6.0, 1000)], MACHINE)
    assert found.h2d == Curve(((10, 3.0), (1000, 6.0), (4000, 24.0)))
    assert found.d2h == MACHINE.d2h and found.both == MACHINE.both


def test_copies_that_others_have_disturbed_do_not_count_where_some_were_alone() -> None:
    spans = [
        copied(Lane.H2D, 0.0, 4.0, 1000),
        copied(Lane.D2H, 3.0, 9.0, 1000),
        copied(Lane.H2D, 9.0, 11.0, 1000),
        copied(Lane.D2H, 20.0, 24.0, 2000),
    ]
    found = speeds_of(spans, MACHINE)
    assert found.h2d.seconds(1000) == 2.0
    assert (found.d2h.seconds(1000), found.d2h.seconds(2000)) == (6.0, 6.0), "disturbed, and no faster beyond"
    assert speeds_of(spans).h2d.seconds(1000) == 3.0, "without a machine all of them count"


def machine() -> MachineProfile:
    copies = tuple(CopyRate(route, True, size, (size / 1e8,)) for route in Route for size in (1 << 12, 1 << 20))
    return MachineProfile("cpu", True, copies, (), {}, identity=identify(torch.device("cpu")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of kept profiles, with one of this machine in it."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert keep_profile(machine()) is not None
    yield tmp_path


def first_steps(**options: Any) -> tuple[UnitProfile, list[str]]:
    """Train until the plan was chosen; return what it was chosen from, and what was warned of about the machine."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_BLOCKS)))
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings(record=True) as caught, attach(model, optimizer, device="cpu", **options) as pipe:
        warnings.simplefilter("always")
        for _ in range(6):
            model(torch.randn(4, WIDTH)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        profile = pipe.unit_profile()
    assert profile is not None
    said = [str(each.message) for each in caught if issubclass(each.category, SuperpipeWarning)]
    return profile, [each for each in said if "profile" in each]


def test_a_run_takes_from_the_kept_profile_what_it_has_not_seen(cache: Path) -> None:
    profile, said = first_steps()
    assert profile.speeds.both == machine().speeds().both and not said
    assert profile.speeds.use_s == 0.0, "times of units hold it already"
    sizes = [size for size, _ in profile.speeds.h2d.points]
    assert 1 << 20 in sizes and profile.workload.units[0].weight_bytes in sizes


def test_an_emulated_link_is_not_the_machines(cache: Path) -> None:
    profile, said = first_steps(link=Link(h2d_gb_s=1.0, d2h_gb_s=1.0))
    assert profile.speeds.both is None and not said


def test_without_a_kept_profile_nothing_is_said_or_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    profile, said = first_steps()
    assert profile.speeds.both is None and not said
    assert not list(tmp_path.iterdir())


def test_a_corrupt_profile_is_said_once_and_the_run_goes_on(cache: Path) -> None:
    (file,) = cache.iterdir()
    file.write_text("{", encoding="utf-8")
    profile, said = first_steps(update_on_device="auto", update="after_backward")
    assert profile.speeds.both is None
    assert len(said) == 1 and "corrupt" in said[0]


def test_a_stale_profile_is_said_once_and_the_run_goes_on(cache: Path) -> None:
    (file,) = cache.iterdir()
    old = machine()
    replace(old, identity=replace(old.identity, torch="1.0")).save(file)
    profile, said = first_steps(update_on_device="auto", update="after_backward")
    assert profile.speeds.both is None
    assert len(said) == 1 and "no longer holds" in said[0]
