"""Between two steps an engine changes over to another window, other residents, other policies: no number changes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from lightning_superpipe.engine.activations import choose_policies
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.planning.workload import Setting
from tests.engine.tiny import CPU, WIDTH, batches, chain, is_equal, open_engine, train

NUM_BLOCKS = 6
ORDER = tuple(range(NUM_BLOCKS))
POLICIES = ("keep", "recompute", "offload")
SETTINGS = [
    Setting(1),
    Setting(6),
    Setting(2, activations=("recompute",) * NUM_BLOCKS),
    Setting(3, 2, resident=2, activations=tuple(itertools.islice(itertools.cycle(POLICIES), NUM_BLOCKS))),
    Setting(2, 1, resident=4),
    Setting(4, 4, activations=("offload",) * NUM_BLOCKS),
    Setting(2, activations=("keep",) * NUM_BLOCKS),
]

pytestmark = pytest.mark.usefixtures("everything_travels")


def changing(engine: Engine, settings: Iterator[Setting]) -> contextlib.AbstractContextManager[object]:
    """Scope of a step before which the engine changes over."""
    if (setting := next(settings, None)) is not None:
        engine.adopt(setting, ORDER)
        assert len(engine.slots.slots) == min(setting.k + setting.resident, NUM_BLOCKS)
    return engine.step("train")


@pytest.mark.parametrize("max_delay_ms", [0.0, 2.0])
@pytest.mark.parametrize("first", range(len(SETTINGS)))
@pytest.mark.parametrize("fused", [False, True])
def test_every_change_over_is_exact(first: int, max_delay_ms: float, fused: bool) -> None:
    settings = SETTINGS[first:] + SETTINGS[:first]
    inputs = batches(2 * len(settings))
    expected = train(chain(NUM_BLOCKS, dropout=0.2), inputs, fused=fused)
    module = chain(NUM_BLOCKS, dropout=0.2)
    lanes = ThreadLanes(CPU, None, max_delay_ms=max_delay_ms, seed=first)
    choices = choose_policies("auto", [f"blocks.{i}" for i in ORDER])
    with open_engine(module, lanes, k=2, choices=choices) as engine:
        sequence = itertools.chain(settings, reversed(settings))
        assert is_equal(train(module, inputs, lambda: changing(engine, sequence), fused=fused), expected)


@pytest.mark.emu
@pytest.mark.parametrize("max_delay_ms", [0.0, 2.0])
def test_every_change_over_is_exact_on_a_second_device(emu: torch.device, max_delay_ms: float) -> None:
    inputs = [x.to(emu) for x in batches(2 * len(SETTINGS))]
    reference = chain(NUM_BLOCKS).to(emu)
    expected = train(reference, inputs)
    module = chain(NUM_BLOCKS)
    lanes = ThreadLanes(emu, None, max_delay_ms=max_delay_ms)
    choices = choose_policies("auto", [f"blocks.{i}" for i in ORDER])
    with open_engine(module, lanes, k=2, choices=choices) as engine:
        sequence = itertools.chain(SETTINGS, reversed(SETTINGS))
        found = train(module, inputs, lambda: changing(engine, sequence))
    assert found.losses == expected.losses
    assert all(map(torch.equal, found.weights, [weight.cpu() for weight in expected.weights]))


def test_a_graph_goes_on_through_a_change_over_between_its_forward_and_its_backward() -> None:
    x = batches(1)[0]
    module, plain = chain(NUM_BLOCKS), chain(NUM_BLOCKS)
    plain(x).pow(2).mean().backward()
    choices = choose_policies("auto", [f"blocks.{i}" for i in ORDER])
    for before, after in itertools.permutations(SETTINGS, 2):
        module.zero_grad()
        with open_engine(module, ThreadLanes(CPU, None), k=2, choices=choices) as engine:
            engine.adopt(before, ORDER)
            with engine.step("train"):
                loss = module(x).pow(2).mean()
            engine.adopt(after, ORDER)
            loss.backward()
            gradients = [parameter.grad for parameter in module.parameters()]
            assert all(
                torch.equal(g, p.grad)  # type: ignore[arg-type]
                for g, p in zip(gradients, plain.parameters(), strict=True)
            )


def test_memory_of_slots_that_are_given_up_is_let_go() -> None:
    module = chain(NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), k=6) as engine:
        train(module, batches(1), lambda: engine.step("train"))
        buffers = [slot.buffer.untyped_storage()._weak_ref() for slot in engine.slots.slots]  # type: ignore[attr-defined]
        engine.adopt(Setting(2), ORDER)
        alive = [not torch.UntypedStorage._expired(ref) for ref in buffers]  # type: ignore[attr-defined]
        for ref in buffers:
            torch.UntypedStorage._free_weak_ref(ref)  # type: ignore[attr-defined]
        assert sum(alive) == 2


def test_a_view_of_a_slot_that_is_given_up_keeps_its_values() -> None:
    module = chain(NUM_BLOCKS)
    with open_engine(module, ThreadLanes(CPU, None), k=6) as engine:
        with engine.step("train"):
            module(batches(1)[0])
        units = [unit for unit in engine.units if unit.slot is not None]
        views = [unit.twin(1).data[:2] for unit in units]
        expected = [unit.parameters[1].detach()[:2].clone() for unit in units]
        engine.adopt(Setting(1), ORDER)
        assert len(views) == 6 and all(map(torch.equal, views, expected))


def test_named_policies_stay() -> None:
    module = chain(NUM_BLOCKS)
    names = [f"blocks.{i}" for i in ORDER]
    choices = choose_policies({"blocks.0": "recompute", "*": "auto"}, names)
    with open_engine(module, ThreadLanes(CPU, None), choices=choices) as engine:
        engine.adopt(Setting(2, activations=("offload",) * NUM_BLOCKS), ORDER)
        assert engine.activations.policies() == ("recompute", *["offload"] * (NUM_BLOCKS - 1))


def test_without_room_all_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = chain(NUM_BLOCKS), batches(4)
    expected = train(chain(NUM_BLOCKS), inputs)
    with open_engine(module, ThreadLanes(CPU, None), k=2) as engine:
        allocate, num_left = engine.slots._allocate, 2

        def allocate_some() -> torch.Tensor:
            nonlocal num_left
            num_left -= 1
            if num_left < 0:
                raise torch.OutOfMemoryError("no room")
            return allocate()

        monkeypatch.setattr(engine.slots, "_allocate", allocate_some)
        with pytest.raises(torch.OutOfMemoryError):
            engine.adopt(Setting(6, activations=("recompute",) * NUM_BLOCKS), ORDER)
        assert len(engine.slots.slots) == 2 and engine.slots.slot_bytes >= WIDTH
        assert engine.activations.policies() == ("keep",) * NUM_BLOCKS
        assert is_equal(train(module, inputs, lambda: engine.step("train")), expected)
