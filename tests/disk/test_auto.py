"""``auto`` in a run whose state lies in files: the plan knows the disk, its bytes, and what is left in memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_superpipe import Link, attach
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.budget import AUTO_K
from lightning_superpipe.planning.choose import Choice
from lightning_superpipe.planning.disk_work import DiskWork
from tests.disk.loops import EVERYTHING, NUM_BLOCKS, WIDTH, Left, left, make, step, train
from tests.tiers.late_files import hold

NUM_STEPS = 12  # six are measured, then the plan changes
PAGE = 4096
OFFLOADED = {"activations": "offload", "store": EVERYTHING}

pytestmark = pytest.mark.filterwarnings("ignore:there is no accelerator", "ignore:.*streaming cannot pay")


@contextmanager
def strict() -> Iterator[None]:
    """Turn into an error what a run says when it finds no plan."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no plan was found")
        yield


def run(announces: bool = False, **options: Any) -> tuple[Left, Any, Choice]:
    """Train with the window left open; return what is left, the report and the choice."""
    model, optimizer = make()
    with strict(), attach(model, optimizer, device="cpu", **options) as pipe:
        by = {"announced_by": pipe} if announces else {}
        losses = [step(model, optimizer, number, **by) for number in range(NUM_STEPS)]
        report, choice = pipe.report(), pipe._session._tuner.choice
    assert choice is not None
    return left(model, optimizer, losses), report, choice


@pytest.fixture(scope="module")
def plain() -> Left:
    return train(None, steps=NUM_STEPS)


@pytest.mark.parametrize("announces", [False, True])
@pytest.mark.parametrize(
    "options", [{"store": "disk"}, {"store": {"states": "disk"}}, {"store": {"weights": "disk"}}, OFFLOADED]
)
def test_run_that_chooses_beside_files_equals_the_ordinary_one(
    options: dict[str, Any], announces: bool, plain: Left
) -> None:
    found, report, choice = run(announces, **options)
    assert found.equals(plain)
    assert f"files: {choice.prediction.disk}" in " ".join(report.plan.split())


@pytest.mark.parametrize("store", ["disk", {"states": "disk"}, {"weights": "disk"}, {"gradients": "disk"}, EVERYTHING])
def test_bytes_are_predicted_but_for_what_fills_pages(store: Any) -> None:
    _, report, choice = run(store=store, update="at_once")
    predicted, took = choice.prediction.disk, report.last_step
    per_unit = 3 * PAGE  # a slab of weights, one of states, one of gradients
    assert predicted.written_bytes <= took.disk_written_bytes <= predicted.written_bytes + NUM_BLOCKS * per_unit
    assert predicted.read_bytes <= took.disk_read_bytes <= predicted.read_bytes + 3 * NUM_BLOCKS * per_unit


@pytest.mark.parametrize("others", [{}, {"weights": "disk", "states": "disk"}])
def test_activations_are_part_of_what_is_predicted(others: dict[str, str]) -> None:
    found = []
    for policy in ("keep", "offload"):
        model, optimizer = make()
        options: dict[str, Any] = {"store": {"activations": "disk", **others}, "activations": policy, "link": Link()}
        with strict(), attach(model, optimizer, device="cpu", update="at_once", **options) as pipe:
            for number in range(NUM_STEPS):
                model(
                    torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(number))
                ).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            choice, took = pipe._session._tuner.choice, pipe.report().last_step
        assert choice is not None
        found.append((choice.prediction.disk, DiskWork(took.disk_read_bytes, took.disk_written_bytes)))
    predicted, measured = (offloaded.since(kept) for kept, offloaded in zip(*found, strict=True))
    assert 0 < predicted.read_bytes < predicted.written_bytes
    assert predicted.written_bytes <= measured.written_bytes <= predicted.written_bytes + NUM_BLOCKS * PAGE
    per_batch = predicted.written_bytes // (NUM_BLOCKS - 1) + PAGE  # whether one is late is a matter of microseconds
    assert abs(measured.read_bytes - predicted.read_bytes) <= NUM_BLOCKS * PAGE + 2 * per_batch


@pytest.mark.parametrize("store", ["disk", {"states": "disk"}, EVERYTHING])
def test_what_lies_in_files_does_not_count_against_the_host(store: Any, plain: Left) -> None:
    model, _ = make()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    limit = int(3.6 * weights)  # of the four times as much that a training without files holds
    found, report, choice = run(store=store, host_memory=limit, disk={"undo": False})
    assert found.equals(plain)
    assert choice.prediction.host.total <= limit
    predicted, held = choice.prediction.host, report.host
    assert abs(predicted.weights - held.weights) < 1024  # between tensors
    assert abs(predicted.states - held.states) < 1024
    assert held.gradients <= predicted.gradients <= weights * ("gradients" not in store)


def test_where_the_device_is_the_host_files_are_not_undone_by_slots() -> None:
    _, _, choice = run(store="disk")
    assert choice.setting.k + choice.setting.resident <= AUTO_K < NUM_BLOCKS
    _, _, whole = run(store="disk", device_memory="1GiB", step_aside=False)
    assert whole.setting.k == NUM_BLOCKS


def test_what_was_measured_of_files_is_kept_in_a_profile(tmp_path: Path) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store=EVERYTHING) as pipe:
        for number in range(NUM_STEPS):
            step(model, optimizer, number)
        profile = pipe.unit_profile()
    assert profile is not None and profile.speeds.disk_read is not None and profile.speeds.disk_write is not None
    assert profile.workload.in_files == ("activations", "gradients")
    profile.save(tmp_path / "profile.json")
    assert UnitProfile.load(tmp_path / "profile.json") == profile


def test_a_slow_disk_is_seen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    train(None, steps=NUM_STEPS)
    delay_s = (time.monotonic() - start) / NUM_STEPS  # a read takes as long as all that a step computes
    hold(monkeypatch, "fetch", lambda _: time.sleep(delay_s))
    _, report, choice = run(store="disk")
    assert choice.prediction.busiest == "disk"
    assert "disk alone takes" in report.plan
    assert choice.prediction.step_s > delay_s * 2 * NUM_BLOCKS


def test_frozen_weights_are_read_and_nothing_is_written() -> None:
    model, _ = make()
    model.requires_grad_(False).eval()
    with strict(), attach(model, device="cpu", store="disk") as pipe, torch.no_grad():
        for number in range(NUM_STEPS):
            model(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number)))
        choice = pipe._session._tuner.choice
    assert choice is not None
    assert choice.prediction.disk.read_bytes > 0 == choice.prediction.disk.written_bytes


def test_adapters_beside_frozen_weights_are_predicted_to_write_nothing() -> None:
    model, _ = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("norm.weight"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with strict(), attach(model, optimizer, device="cpu", store="disk") as pipe:
        for number in range(NUM_STEPS):
            step(model, optimizer, number)
        report, choice = pipe.report(), pipe._session._tuner.choice
    assert choice is not None
    assert choice.prediction.disk.written_bytes == report.last_step.disk_written_bytes == 0
    assert choice.prediction.disk.read_bytes == pytest.approx(report.last_step.disk_read_bytes, rel=0.2)
