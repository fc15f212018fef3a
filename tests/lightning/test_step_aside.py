"""Where all that the ordinary run holds fits on the device, streaming ends and that run goes on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import Link, SuperpipeStrategy
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import BudgetError
from tests.emu import capacity, used_bytes
from tests.parity.harness import Outcome, assert_equal, outcome, run_case, trainer
from tests.parity.probe import Block, ParityCase, ProbeModule

NUM_STEPS, STEP = 16, 6  # four epochs of four; the first that streams no more
DEVICES = ["cpu", pytest.param("emu", marks=pytest.mark.emu)]
HOSTILE = Adversary(max_delay_ms=1.0)

pytestmark = pytest.mark.filterwarnings("ignore::lightning_superpipe.errors.SuperpipeWarning")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(SuperpipeStrategy, "_tell", told.append)
    return told


def strategy_for(device: Any, **options: Any) -> SuperpipeStrategy:
    link = {"link": Link()} if device == "cpu" else {}
    return SuperpipeStrategy(**{"device_memory": "1MiB", "adversary": HOSTILE, **link, **options})


def case_of(module: Callable[[], ProbeModule], **options: Any) -> ParityCase:
    return ParityCase(
        "aside", "streaming ends in mid-run", module, options={"max_epochs": 4, **options}, stages=("fit",)
    )


class Places(L.Callback):
    """Notes where weights, buffers and states are when a step ends, and whether the module has its own class."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []
        self.is_ordinary: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        tensors = [*module.parameters(), *module.buffers(), *(value for value in states if value.dim())]
        self.seen.append({tensor.device.type for tensor in tensors})
        self.is_ordinary.append(type(module.blocks[0]) is Block)


class Momentum(ProbeModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, foreach=False)


class Averaging(ProbeModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.ASGD(self.parameters(), lr=1e-2, foreach=False)


class Nesterov(ProbeModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.NAdam(self.parameters(), lr=1e-2, foreach=False)


class Normed(ProbeModule):
    """With buffers, a tied weight and a part that is not trained."""

    def build(self) -> None:
        self.norm = nn.BatchNorm1d(16)
        self.block(1).up.weight = self.block(0).up.weight
        self.block(2).requires_grad_(False)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(self.norm(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (ProbeModule, {}),
        (ProbeModule, {"accumulate_grad_batches": 2, "max_epochs": 8}),
        (ProbeModule, {"gradient_clip_val": 0.01}),
        (ProbeModule, {"precision": "bf16-mixed"}),
        (Momentum, {}),
        (Averaging, {}),
        (Nesterov, {}),
        (Normed, {}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else value.__name__,
)
def test_a_run_that_steps_aside_equals_the_ordinary_one(
    device: Any, module: type[ProbeModule], options: dict[str, Any], said: list[str]
) -> None:
    case = case_of(module, **options)
    strategy = strategy_for(device)
    assert_equal(run_case(case, device), run_case(case, device, strategy))
    found = re.search(
        r"fit on the device, .* of 1\.0 MiB: from step (\d+) on the run goes on as without superpipe", said[-1]
    )
    assert found is not None and int(found[1]) == strategy.report().num_steps < NUM_STEPS
    assert said[-1].removeprefix("superpipe: ").rstrip(".") in strategy.report().plan


@pytest.mark.emu
def test_everything_is_on_the_device_from_then_on() -> None:
    places = Places()
    trainer("emu", strategy_for("emu", step_aside=True), max_epochs=4, callbacks=[places]).fit(ProbeModule())
    assert places.seen == [{"cpu"}] * STEP + [{"emu"}] * (NUM_STEPS - STEP)
    assert places.is_ordinary == [False] * STEP + [True] * (NUM_STEPS - STEP)


def test_code_of_the_users_keeps_the_run_streaming_and_that_is_said(said: list[str]) -> None:
    class Own(ProbeModule):
        def on_train_batch_end(self, *_: object) -> None:
            """May hold anything."""

    strategy = strategy_for("cpu")
    case = case_of(Own)
    assert_equal(run_case(case, "cpu"), run_case(case, "cpu", strategy))
    assert strategy.report().num_steps == NUM_STEPS
    assert len([each for each in said if "with step_aside=True the run goes on as without superpipe" in each]) == 1
    again = strategy_for("cpu", step_aside=True)
    assert_equal(run_case(case, "cpu"), run_case(case, "cpu", again))
    assert again.report().num_steps == STEP


def test_a_module_that_holds_copies_of_its_weights_keeps_streaming() -> None:
    class Anchored(ProbeModule):
        """Is drawn back to what its first block was in the beginning."""

        def loss(self, x: Tensor) -> Tensor:
            if not hasattr(self, "first"):
                self.first = {"up": self.block(0).up.weight.detach().clone()}
            return super().loss(x) + (self.block(0).up.weight - self.first["up"].to(x.device)).pow(2).mean()

    strategy, case = strategy_for("cpu"), case_of(Anchored)
    assert_equal(run_case(case, "cpu"), run_case(case, "cpu", strategy))
    assert strategy.report().num_steps == NUM_STEPS


@pytest.mark.parametrize(
    "options",
    [
        {"step_aside": False},
        {"k": 2},
        {"resident": 1},
        {"activations": "keep"},
        {"update_on_device": 0.5},
        {"store": "disk"},
        {"record_step": NUM_STEPS - 1},
        {"device_memory": "80KiB"},  # all units, but not gradients and states as well
        {"device_memory": None},
    ],
    ids=str,
)
def test_what_was_asked_for_goes_on(options: dict[str, Any]) -> None:
    strategy = strategy_for("cpu", **options)
    case = case_of(ProbeModule)
    assert_equal(run_case(case, "cpu"), run_case(case, "cpu", strategy))
    assert strategy.report().num_steps == NUM_STEPS
    if options.get("device_memory") == "80KiB":
        assert "everything fits, so no unit leaves the device" in strategy.report().plan


def test_a_checkpoint_of_such_a_run_loads_anywhere(tmp_path: Path) -> None:
    def half(strategy: Any, name: str) -> Path:
        L.seed_everything(0, verbose=False)
        run = trainer("cpu", strategy, max_epochs=2)
        run.fit(ProbeModule())
        run.save_checkpoint(tmp_path / name)
        return tmp_path / name

    def rest(path: Path, strategy: Any) -> Outcome:
        L.seed_everything(1, verbose=False)
        run = trainer("cpu", strategy, max_epochs=4, num_sanity_val_steps=0)
        module = ProbeModule()
        run.fit(module, ckpt_path=str(path))
        return outcome(module, run)

    ordinary, aside = half(None, "ordinary.ckpt"), half(strategy_for("cpu"), "aside.ckpt")
    wanted = rest(ordinary, None)
    assert_equal(wanted, rest(aside, None))
    assert_equal(wanted, rest(ordinary, strategy_for("cpu")))
    assert_equal(wanted, rest(aside, strategy_for("cpu", step_aside=False)))


class Reloading(L.Callback):
    """Loads states in mid-run, as searches for learning rates do."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.current_epoch == 3:
            states = [optimizer.state_dict() for optimizer in trainer.optimizers]
            trainer.strategy.load_optimizer_state_dict({"optimizer_states": copy.deepcopy(states)})


@pytest.mark.emu
def test_states_that_are_loaded_afterwards_go_where_the_parameters_are() -> None:
    case = case_of(ProbeModule, callbacks=lambda _: [Reloading()])
    strategy = strategy_for("emu", step_aside=True)
    assert_equal(run_case(case, "emu"), run_case(case, "emu", strategy))
    assert strategy.report().num_steps == STEP


class Judged(ProbeModule):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record("test", self(batch))

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def test_evaluation_afterwards_streams_anew() -> None:
    case = ParityCase("aside", "fit, then test", Judged, options={"max_epochs": 4}, stages=("fit", "validate", "test"))
    assert_equal(run_case(case, "cpu"), run_case(case, "cpu", strategy_for("cpu")))


# -- no room


class Failing(ProbeModule):
    """Runs out of memory once: in the forward or the backward of one batch, counted over all steps."""

    def __init__(self, where: str = "", when: int = -1) -> None:
        super().__init__()
        self.where, self.when = where, when

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if loss is not None and len(self.losses) - 1 == self.when:
            self.when = -1
            self.losses.pop()
            if self.where == "forward":
                self.fail()
            loss.register_hook(self.fail)  # type: ignore[no-untyped-call]
        return loss

    def fail(self, *_: object) -> None:
        raise torch.OutOfMemoryError("the device has 0 bytes left.")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_without_room_streams_again_and_is_repeated(device: Any, where: str, said: list[str]) -> None:
    strategy = strategy_for(device)
    found = run_case(case_of(partial(Failing, where, 9)), device, strategy)
    assert_equal(run_case(case_of(Failing), device), found)
    assert strategy.report().num_steps == NUM_STEPS - 9
    assert any("the device has 0 bytes left. The run streams again and repeats the step." in each for each in said)
    assert sum("the run goes on as without superpipe" in each for each in said) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("when", [18, 19])
def test_between_accumulated_batches_a_step_is_repeated_or_undone(where: str, when: int) -> None:
    """A batch that no step follows is not the optimizer's to repeat."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 8}
    made: list[Failing] = []

    def make() -> Failing:
        made.append(Failing(where, when))
        return made[0]

    case, strategy = case_of(make, **options), strategy_for("cpu")
    if (where, when) == ("forward", 19):
        assert_equal(run_case(case_of(Failing, **options), "cpu"), run_case(case, "cpu", strategy))
        return
    with pytest.raises(BudgetError, match=r"those of the last finished (step|one)"):
        run_case(case, "cpu", strategy)
    shorter = case_of(Failing, **options, max_steps=9)
    wanted = run_case(shorter, "cpu").weights
    assert all(torch.equal(value, wanted[name]) for name, value in made[0].state_dict().items())
    assert where == "forward" or all(parameter.grad is None for parameter in made[0].parameters())


@pytest.mark.emu
def test_where_there_is_less_room_than_was_known_streaming_goes_on(said: list[str]) -> None:
    case, strategy = case_of(ProbeModule), strategy_for("emu")
    expected = run_case(case, "emu")
    with capacity(used_bytes() + (52 << 10)):
        assert_equal(expected, run_case(case, "emu", strategy))
    assert strategy.report().num_steps == NUM_STEPS - STEP
    assert any("not all that was to fit on the device had room there" in each for each in said)
