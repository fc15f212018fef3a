"""Trainers, strategies and modules are deep-copied, pickled, torn down and used again in unusual ways."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.errors import SuperpipeError
from tests.lightning.stories import WINDOW, Bench, Originals, Story, assert_same, devices
from tests.parity.harness import trainer
from tests.parity.probe import Block, Device, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")

Copier = Callable[[Any], Any]


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def through_torch_save(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS: list[Copier] = [copy.deepcopy, copy.copy, pickled, through_torch_save]


def assert_plain(module: nn.Module) -> None:
    """Raise AssertionError unless all classes are the original ones and all parameters are on the host."""
    streamed = [name for name, child in module.named_modules() if hasattr(type(child), "_superpipe_base")]
    assert streamed == []
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in module.parameters())


class CopiesBlocks(Callback):
    """Copies the blocks after each step and computes with the copy."""

    def __init__(self, copier: Copier, *, is_streamed: bool) -> None:
        self.copier, self.is_streamed = copier, is_streamed

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, ProbeModule)
        copied = self.copier(pl_module.blocks)
        if self.is_streamed:
            assert_plain(copied)
        x = torch.ones(2, pl_module.embed.in_features, device=pl_module.device)
        pl_module.record("copy", copied.to(pl_module.device)[1](x))


def copies_modules_in_mid_run(copier: Copier) -> Story:
    def story(bench: Bench) -> ProbeModule:
        module = ProbeModule()
        callback = CopiesBlocks(copier, is_streamed=bench.window is not None)
        bench.trainer(callbacks=[callback], max_epochs=1).fit(module)
        return module

    story.__name__ = copier.__name__
    return story


STORIES = [copies_modules_in_mid_run(copier) for copier in (copy.deepcopy, pickled, through_torch_save)]


@pytest.mark.parametrize(("story", "device"), devices(STORIES))
def test_copies_made_in_mid_run_compute_like_those_of_the_ordinary_run(story: Story, device: Device) -> None:
    assert_same(story, device)


class CopiesTrainer(Callback):
    """Deep-copies and pickles the whole Trainer, strategy and module included, in the middle of a fit."""

    def __init__(self, *, is_streamed: bool) -> None:
        self.is_streamed = is_streamed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != 1:
            return
        for copier in (copy.deepcopy, pickled):
            twin: L.Trainer = copier(trainer)
            assert twin.strategy is not trainer.strategy
            assert twin.global_step == trainer.global_step
            if self.is_streamed:
                assert_plain(twin.lightning_module)
            state = twin.lightning_module.state_dict()
            assert all(torch.equal(state[name], value) for name, value in pl_module.state_dict().items())


class AnyData(ProbeModule):
    """Keeps its data loaders where pickle finds them."""


def trainer_copied_in_mid_run(bench: Bench) -> ProbeModule:
    module = AnyData()
    bench.trainer(callbacks=[CopiesTrainer(is_streamed=bench.window is not None)], max_epochs=2).fit(module)
    return module


def trainer_copied_between_runs(bench: Bench) -> ProbeModule:
    module = AnyData()
    run = bench.trainer(max_epochs=1)
    run.fit(module)
    again = copy.deepcopy(run)
    bench.strategies.append(again.strategy)
    again.fit_loop.max_epochs = 2
    second = again.lightning_module
    assert isinstance(second, AnyData)
    again.fit(second)
    second.extra += list(module.state_dict().items())
    return second


def trainer_pickled_before_any_run(bench: Bench) -> ProbeModule:
    run = pickled(bench.trainer(max_epochs=1))
    bench.strategies[:] = [run.strategy]
    module = AnyData()
    run.fit(module)
    return module


def module_pickled_after_a_run(bench: Bench) -> ProbeModule:
    module = AnyData()
    bench.trainer(max_epochs=1).fit(module)
    module.trainer = None
    thawed: AnyData = pickled(module)
    assert_plain(thawed)
    bench.trainer(max_epochs=1).fit(thawed)
    return thawed


@pytest.mark.parametrize("copier", COPIERS, ids=lambda copier: copier.__name__)
def test_a_copied_strategy_is_a_fresh_one_with_the_same_options(copier: Copier) -> None:
    strategy = SuperpipeStrategy(k=2, units=["Block"])
    trainer("cpu", strategy, max_epochs=1).fit(ProbeModule())
    copied: SuperpipeStrategy = copier(strategy)
    assert copied.config == strategy.config
    if copier is not copy.copy:
        with pytest.raises(SuperpipeError, match="nothing has run yet"):
            copied.report()
    fresh = SuperpipeStrategy(config=copied.config)
    trainer("cpu", fresh, max_epochs=1).fit(ProbeModule())
    assert fresh.report().num_loads == strategy.report().num_loads


class StepsByHand(ProbeModule):
    """Runs forward, backward and update with the strategy's own methods, after its teardown."""


def backward_after_teardown(bench: Bench) -> ProbeModule:
    module = StepsByHand()
    run = bench.trainer(max_epochs=1)
    run.fit(module)
    batch = next(iter(fixed_batches(1)))
    loss = module.loss(batch)
    run.strategy.backward(loss, None)
    module.record("gradient", module.block(0).up.weight.grad)  # type: ignore[arg-type]
    run.strategy.teardown()
    run.strategy.teardown()
    module.record_loss(run.strategy.training_step(batch, 0))  # type: ignore[arg-type]
    run.strategy.validation_step(batch, 0)
    return module


def backward_over_a_graph_that_a_teardown_cut(bench: Bench) -> ProbeModule:
    """The graph was made while units streamed; backward runs when the strategy is gone."""
    module = StepsByHand()

    class Keeps(Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.loss = module.loss(next(iter(fixed_batches(1))).to(pl_module.device))

    keeps = Keeps()
    bench.trainer(max_epochs=1, callbacks=[keeps]).fit(module)
    module.zero_grad()
    keeps.loss.backward()  # type: ignore[no-untyped-call]
    module.record("gradient", module.block(0).up.weight.grad)  # type: ignore[arg-type]
    return module


TRAINERS: list[Callable[[Bench], Any]] = [
    trainer_copied_in_mid_run,
    trainer_copied_between_runs,
    trainer_pickled_before_any_run,
    module_pickled_after_a_run,
]


@pytest.mark.parametrize(("story", "device"), devices(TRAINERS))
def test_copied_trainers_run_like_ordinary_ones(story: Story, device: Device) -> None:
    assert_same(story, device)


# On another device the ordinary run fails too: its weights are gone from there, its graph is not.
TEARDOWNS = [*devices([backward_after_teardown]), *devices([backward_over_a_graph_that_a_teardown_cut], emu=False)]


@pytest.mark.parametrize(("story", "device"), TEARDOWNS)
def test_backward_after_teardown_equals_the_ordinary_one(story: Story, device: Device) -> None:
    assert_same(story, device)


class Holds(Block):
    """A user class that pickles itself in its own way."""

    def __reduce__(self) -> Any:
        return (_rebuild, (self.state_dict(),))


def _rebuild(state: dict[str, Tensor]) -> Holds:
    made = Holds()
    made.load_state_dict(state)
    return made


def test_classes_with_their_own_way_to_pickle_are_respected() -> None:
    class Module(ProbeModule):
        def build(self) -> None:
            self.blocks = nn.ModuleList(Holds() for _ in range(3))

        def on_train_batch_end(self, *args: Any) -> None:
            thawed = pickled(self.blocks[0])
            assert type(thawed) is Holds
            assert all(torch.equal(a, b) for a, b in zip(thawed.parameters(), self.blocks[0].parameters(), strict=True))

    module = Module()
    originals = Originals(module)
    bench = Bench("cpu", WINDOW)
    bench.trainer(max_epochs=1).fit(module)
    assert bench.num_loads() > 0
    originals.assert_kept()
