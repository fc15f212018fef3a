"""Slots that trade their memory with the buffers of files: nothing is copied, nobody sees others' bytes."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import attach
from lightning_superpipe.config import Adversary, Link
from lightning_superpipe.engine import thread_lanes
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.residency import Residency
from lightning_superpipe.engine.traded_slots import TradedSlots
from lightning_superpipe.tiers.disk import DiskSlab
from tests.disk.loops import NUM_BLOCKS, Left, left, make, step, train

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


def engine_of(pipe: Any) -> Engine:
    engine: Engine = pipe._session._engine
    return engine


def late_reads(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Let each read from a file take up to some milliseconds longer, and show at its end only."""
    fetch, rng = DiskSlab.fetch, random.Random(seed)

    def late(self: DiskSlab, target: Tensor) -> None:
        target.fill_(255)  # NaN, for who does not wait
        time.sleep(rng.random() * 4e-3)
        fetch(self, target)

    patch.setattr(DiskSlab, "fetch", late)


def train_announced(steps: int = STEPS, *, announces: bool = True, **options: Any) -> tuple[Left, int]:
    """Train from files; return what is left, and how often memory was traded."""
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", store="disk", **options) as pipe:
        by = pipe if announces else None
        losses = [step(model, optimizer, number, announced_by=by) for number in range(steps)]
        slots = engine_of(pipe).slots
        num_traded = slots.num_traded if isinstance(slots, TradedSlots) else 0
    return left(model, optimizer, losses), num_traded


@pytest.mark.parametrize("announces", [False, True])
@pytest.mark.parametrize(
    ("k", "k_prime", "ring"), [(1, 1, 2), (2, 1, 2), (3, 2, 3), (3, 1, NUM_BLOCKS), (NUM_BLOCKS, 1, 2)]
)
def test_traded_memory_changes_no_bit(
    k: int, k_prime: int, ring: int, announces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_reads(monkeypatch, seed=10 * k + ring)
    hostile = Adversary(poison=True, shuffle_slots=True, seed=k)
    options = {"k": k, "k_prime": k_prime, "disk": {"ring": ring}, "adversary": hostile}
    found, num_traded = train_announced(announces=announces, **options)
    assert found.equals(train(None, steps=STEPS))
    assert num_traded >= NUM_BLOCKS


def test_nothing_is_copied_where_device_and_host_are_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = thread_lanes._copy

    def counted(target: Tensor, source: Tensor) -> None:
        copied.append(source.nbytes)
        copy(target, source)

    monkeypatch.setattr(thread_lanes, "_copy", counted)
    train_announced(k=2)
    assert copied == []
    _, num_traded = train_announced(k=2, link=Link(latency_ms=0.01))
    assert copied and num_traded == 0, "an emulated link has its copies"


class KeepsView(nn.Module):
    """Appends a view of its weight to a list that outlives the call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().t())
        return x + torch.tanh(x @ self.weight)


def test_views_that_somebody_keeps_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(KeepsView() for _ in range(5)))
    before = [block.weight.detach().t().clone() for block in model]  # type: ignore[union-attr, operator]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, device="cpu", k=2, store="disk", units=["*"]) as pipe:
        for _ in range(3):
            loss = model(torch.ones(4, 64)).pow(2).mean()
            with pipe.updating(optimizer):
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    kept = [block.seen[0] for block in model]  # type: ignore[index, union-attr]
    assert all(map(torch.equal, kept, before)), "views of the first step hold what it had"


def test_memory_is_not_given_away_while_something_is_read_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, finished = DiskSlab.fetch, []

    def slow(self: DiskSlab, target: Tensor) -> None:
        time.sleep(0.1)
        fetch(self, target)
        finished.append(self)

    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk") as pipe:
        residency: Residency = engine_of(pipe).residency
        monkeypatch.setattr(DiskSlab, "fetch", slow)
        unit = residency.units[0]
        residency.load(unit)
        assert unit.slot is not None and not finished
        residency.evict(unit)
        assert len(finished) == 1


def test_memory_of_slots_that_are_given_up_is_free() -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=4, store="disk") as pipe:
        engine = engine_of(pipe)
        for number in range(2):
            step(model, optimizer, number)
        slots = engine._tier.part("slots")
        held = slots.allocated_bytes
        engine.residency.shrink(2)
        assert slots.allocated_bytes == held // 5 * 3, "two, and where twins of evicted units are parked"
        loss = step(model, optimizer, 2)
    assert loss == train(None, steps=3).losses[-1]
