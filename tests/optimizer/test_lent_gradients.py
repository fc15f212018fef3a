"""Units that are updated in backward share a few pieces of memory for their gradients, which are gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.homes import RING_SIZE, Homes
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.optimizer import UpdateStage
from tests.engine.tiny import CPU, Chain, batches, chain, open_engine
from tests.optimizer.late_updates import LateStage
from tests.optimizer.test_stage import LOOPS, streams_to_the_same

NUM_UNITS = 24
WIDTH = 64  # alignment costs little beside matrices of this size


@contextlib.contextmanager
def updating(
    module: nn.Module, stage_of: type[UpdateStage] = UpdateStage
) -> Iterator[tuple[Engine, UpdateStage, torch.optim.Optimizer]]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    with open_engine(module, ThreadLanes(CPU, None, max_delay_ms=0.1)) as engine:
        updates = stage_of(engine)
        updates.attend([optimizer])
        try:
            yield engine, updates, optimizer
        finally:
            updates.close()


def step(engine: Engine, updates: UpdateStage, optimizer: torch.optim.Optimizer, module: Chain, x: Tensor) -> None:
    with engine.step("train"):
        loss = module(x).square().mean()
    updates.announce(optimizer, lends=True)
    loss.backward()
    optimizer.step()


def test_gradients_take_the_memory_of_a_few_units() -> None:
    module = chain(NUM_UNITS, width=WIDTH)
    with updating(module) as (engine, updates, optimizer):
        held = []
        for x in batches(5, width=WIDTH):
            step(engine, updates, optimizer, module, x)
            optimizer.zero_grad()
            held.append(engine._tier.part("gradients").allocated_bytes)
    of_all = sum(parameter.nbytes for parameter in module.parameters())
    assert held[0] >= of_all  # the first step makes the states, and shows that gradients come once
    assert max(held[1:]) <= 1.1 * RING_SIZE / NUM_UNITS * of_all  # how much of the ring is used is a matter of timing


def test_gradients_are_gone_once_they_are_used() -> None:
    module = chain(4)
    with updating(module) as (engine, updates, optimizer):
        for number, x in enumerate(batches(4)):
            step(engine, updates, optimizer, module, x)
            for unit in engine.units:
                unit.settle()
            assert all((parameter.grad is None) is (number >= 1) for parameter in module.parameters())
            optimizer.zero_grad()


def kept_gradients_stay() -> bool:
    """Whether gradients that somebody took before their update are what they were, two steps later."""
    module = chain(6)
    with updating(module, LateStage) as (engine, updates, optimizer):
        kept: list[Tensor] = []
        copies: list[Tensor] = []
        for number, x in enumerate(batches(6)):
            with engine.step("train"):
                loss = module(x).square().mean()
            updates.announce(optimizer, lends=True)
            loss.backward()
            if number == 3:
                kept = [parameter.grad for parameter in module.blocks[0].parameters() if parameter.grad is not None]
            optimizer.step()
            if number == 3:
                assert kept
                engine.units[0].settle()
                copies = [each.clone() for each in kept]
            optimizer.zero_grad()
        return all(map(torch.equal, kept, copies))


def test_a_gradient_that_somebody_holds_does_not_change_later() -> None:
    assert kept_gradients_stay()


def test_a_held_gradient_changes_where_nobody_looks_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Homes, "_is_free", lambda self, home: True)
    assert not kept_gradients_stay()


def test_numbers_are_wrong_where_memory_is_taken_back_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    lent_until = Homes.lent_until

    def at_once(self: Homes, unit: int, used_up: object) -> bool:
        is_lent = lent_until(self, unit, used_up)  # type: ignore[arg-type]
        with self._lock:
            self._free.append(self._loans.pop(unit).slab) if is_lent else None
        return is_lent

    monkeypatch.setattr(Homes, "lent_until", at_once)
    with contextlib.suppress(RuntimeError):  # or it is noticed
        assert not streams_to_the_same(LOOPS["adamw"], in_backward=True)
