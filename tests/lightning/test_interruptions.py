"""A run that ends by an exception leaves an ordinary module, and the next run is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from torch import Tensor, nn

from tests.lightning.stories import WINDOW, Bench, Originals, Story, assert_same, devices, tensors
from tests.parity.probe import Block, Device, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


class Breaks(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("raised by the test in backward")


class FragileBlock(Block):
    """Raises in the middle of its forward, or in its backward, when told."""

    told: str = ""
    error: type[BaseException] = ValueError

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.told == "unit":
            raise self.error("raised by the test in a unit")
        return Breaks.apply(y) if self.told == "backward" else y  # type: ignore[no-untyped-call]


class Fragile(ProbeModule):
    """Raises at a place and batch that a test chooses."""

    where = ""
    at_batch = 2
    error: type[BaseException] = ValueError

    def build(self) -> None:
        self.fragile = FragileBlock()
        self.blocks[2] = self.fragile

    def break_at(self, place: str, batch_idx: int = -1) -> None:
        """Raise if this is the chosen place."""
        if self.where == place and batch_idx in (-1, self.at_batch) and self.trainer.current_epoch == 0:
            raise self.error(f"raised by the test in {place}")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        in_unit = self.where in ("unit", "backward") and batch_idx == self.at_batch and self.trainer.current_epoch == 0
        self.fragile.told = self.where if in_unit else ""
        self.fragile.error = self.error
        loss = super().training_step(batch, batch_idx)
        self.break_at("training_step", batch_idx)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.break_at("validation_step")

    def on_after_backward(self) -> None:
        self.break_at("on_after_backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.break_at("on_before_optimizer_step")

    def configure_optimizers(self) -> Any:
        if self.where == "configure_optimizers":
            raise self.error("raised by the test in configure_optimizers")
        return super().configure_optimizers()


class RaisesInCallback(Callback):
    """Raises in the hook that the module names."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        cast(Fragile, pl_module).break_at("on_train_batch_end")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cast(Fragile, pl_module).break_at("on_sanity_check_start")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            cast(Fragile, pl_module).break_at("setup")


PLACES = [
    "unit",
    "backward",
    "training_step",
    "validation_step",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_sanity_check_start",
    "setup",
    "configure_optimizers",
]


def interrupted(place: str, error: type[BaseException], *, same_trainer: bool = True) -> Story:
    """A fit that ends early, then a fit, a validation and a forward without any trainer."""

    def story(bench: Bench) -> Fragile:
        module, strategy = Fragile(), bench.strategy()
        module.where, module.error = place, error
        originals = Originals(module)
        run = bench.trainer(strategy, callbacks=[RaisesInCallback()], max_epochs=1)
        with pytest.raises((error, RuntimeError, SystemExit)):
            run.fit(module)
        originals.assert_kept()
        module.fragile.told = module.where = ""
        module.zero_grad()
        module.record("after the exception", module.eval()(torch.ones(2, module.embed.in_features)))
        module.train()
        again = run if same_trainer else bench.trainer(max_epochs=1)
        again.fit(module)
        again.validate(module, verbose=False)
        originals.assert_kept()
        return module

    story.__name__ = f"{place}-{error.__name__}"
    return story


STORIES = [interrupted(place, ValueError) for place in PLACES]
KEYBOARD = [interrupted(place, KeyboardInterrupt) for place in ("unit", "training_step", "on_train_batch_end")]


@pytest.mark.parametrize(("story", "device"), [*devices(STORIES), *devices(KEYBOARD, emu=False)])
def test_fit_after_an_interrupted_fit_equals_the_ordinary_one(story: Story, device: Device) -> None:
    assert_same(story, device)


@pytest.mark.parametrize("place", ["unit", "backward", "training_step"])
def test_another_trainer_takes_over_after_an_exception(place: str) -> None:
    assert_same(interrupted(place, ValueError, same_trainer=False), "cpu")


def saved_in_on_exception(place: str, folder: Path) -> Story:
    """Callbacks see the exception before the strategy does: what they save must be the host's weights."""

    def story(bench: Bench) -> Fragile:
        module = Fragile()
        module.where = place
        kind = "plain" if bench.window is None else "streamed"
        path = folder / f"{kind}-{bench.device}"
        keep = OnExceptionCheckpoint(path, "broken")
        run = bench.trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=1)
        with pytest.raises((ValueError, RuntimeError), match="raised by the test"):
            run.fit(module)
        for name, value in tensors(torch.load(path / "broken.ckpt", weights_only=False)).items():
            module.record(name, value)
        return module

    return story


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("place", ["unit", "backward", "training_step", "on_after_backward"])
def test_checkpoint_saved_while_the_exception_passes_equals_the_ordinary_one(
    place: str, device: Device, tmp_path: Path
) -> None:
    assert_same(saved_in_on_exception(place, tmp_path), device)


class Shapes(ProbeModule):
    """Gets a batch of the wrong width."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch[:, :-1] if batch_idx == 1 else batch, batch_idx)


def test_an_error_of_torch_reaches_the_user_unchanged() -> None:
    messages = []
    for window in (None, WINDOW):
        with pytest.raises(RuntimeError) as caught:
            Bench("cpu", window).trainer().fit(Shapes())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


class Incomplete(L.LightningModule):
    """Has no training step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_what_a_trainer_always_refuses_it_refuses_before_anything_is_touched() -> None:
    module = Incomplete()
    originals = Originals(module)
    with pytest.raises(MisconfigurationException):
        Bench("cpu", WINDOW).trainer().fit(module, fixed_batches(1))
    originals.assert_kept()
