"""How runs are compared here: a *story* uses Trainers in some way; it is told with the ordinary strategy and streamed.

A story gets a `Bench`, makes Trainers with it, and returns its module. What it leaves must be equal by ``torch.equal``:
losses, everything the module recorded, all weights. After the streamed telling every module must have its own class
again and every parameter must be the object that it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.errors import SuperpipeError
from tests.parity.harness import Outcome, Window, assert_equal, loads, outcome, streamed, trainer
from tests.parity.probe import Device, ParityModule, ProbeModule

__all__ = [
    "WINDOW",
    "Bench",
    "Originals",
    "Story",
    "Watched",
    "assert_refused",
    "assert_same",
    "assert_usable",
    "devices",
    "metrics_of",
    "tell",
    "tensors",
]

WINDOW = Window(2, 1)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass
class Bench:
    """Makes the Trainers of one telling.

    Attributes:
        window: None for the ordinary strategy.
        strategies: all that were made, in order.
    """

    device: Device
    window: Window | None
    strategies: list[Strategy] = field(default_factory=list)

    def strategy(self) -> Strategy:
        """Return a new strategy of this telling."""
        if self.window is not None:
            made = streamed(self.window, seed=len(self.strategies))
        else:
            made = SingleDeviceStrategy("emu:0" if self.device == "emu" else "cpu")
        self.strategies.append(made)
        return made

    def trainer(self, strategy: Strategy | None = None, **options: Any) -> L.Trainer:
        """Return a quiet Trainer; ``options`` go to it. A strategy that another Trainer had may be given."""
        if strategy is not None and strategy.accelerator is not None:  # a Trainer refuses to set it again
            return L.Trainer(strategy=strategy, **{**QUIET, **options})
        return trainer(self.device, strategy or self.strategy(), **options)

    def num_loads(self) -> int:
        """Return how many units were copied to the device, in the last run of each strategy."""
        return sum(map(loads, self.strategies)) if self.window is not None else 0


Story = Callable[[Bench], ParityModule]


class Originals:
    """What a module must consist of after a run as before it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before = self._now()

    def _now(self) -> dict[str, object]:
        """Return classes and parameter objects by name."""
        found: dict[str, object] = {name: type(child) for name, child in self.module.named_modules()}
        return found | {f"{name} (parameter)": parameter for name, parameter in self.module.named_parameters()}

    def assert_kept(self) -> None:
        """Raise AssertionError that names what was replaced."""
        now = self._now()
        replaced = [name for name, thing in self._before.items() if now.get(name) is not thing]
        assert replaced == [], f"not what they were before the run: {replaced}"
        assert all(parameter.device.type == "cpu" for parameter in self.module.parameters())


@contextlib.contextmanager
def noting_originals() -> Iterator[None]:
    """Note each module that a streaming strategy gets inside, and look at all of them in the end."""
    seen: dict[int, Originals] = {}
    connect = SuperpipeStrategy.connect

    def noting(strategy: SuperpipeStrategy, model: L.LightningModule) -> None:
        seen.setdefault(id(model), Originals(model))
        connect(strategy, model)

    with mock.patch.object(SuperpipeStrategy, "connect", noting):
        yield
    for originals in seen.values():
        originals.assert_kept()


def tell(story: Story, device: Device, window: Window | None) -> Outcome:
    """Tell a story once and return what it left."""
    torch.manual_seed(0)
    bench = Bench(device, window)
    with noting_originals():
        module = story(bench)
    assert window is None or bench.num_loads() > 0, "nothing was streamed"
    return outcome(module, module.trainer)


def assert_same(story: Story, device: Device, window: Window = WINDOW) -> None:
    """Tell a story with the ordinary strategy and streamed; raise AssertionError at the first difference."""
    assert_equal(tell(story, device, None), tell(story, device, window))


def devices(stories: Iterable[Story], *, emu: bool = True) -> list[Any]:
    """Return (story, device) pairs as parameters of a test, named by the story's function."""
    places: tuple[Device, ...] = ("cpu", "emu") if emu else ("cpu",)
    return [
        pytest.param(story, device, id=f"{story.__name__}-{device}", marks=[pytest.mark.emu] if device == "emu" else [])
        for story in stories
        for device in places
    ]


def metrics_of(module: ProbeModule, run: L.Trainer) -> None:
    """Record the Trainer's metrics in the module, so that they are compared too."""
    for name, value in sorted(run.callback_metrics.items()):
        module.record(name, value)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return all tensors of a nested value by path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: each for k, v in items for key, each in tensors(v, f"{name}/{k}").items()}


class Watched(ProbeModule):
    """Logs what callbacks look at; its validation loss rises in the end."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.record_loss(loss)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) * (1 + 0.5 * abs(self.current_epoch - 1)))

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def assert_refused(module: L.LightningModule, strategy: SuperpipeStrategy, message: str, **options: Any) -> str:
    """Fit, expect a refusal before any batch, and train the same module with the same data afterwards."""
    originals = Originals(module)
    before = {name: value.clone() for name, value in module.state_dict().items()} if _copies(module) else {}
    with pytest.raises(SuperpipeError, match=message) as caught:
        trainer("cpu", strategy, max_epochs=1, **options).fit(module)
    originals.assert_kept()
    assert getattr(module, "losses", []) == [], "refused too late"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if name in before)
    assert isinstance(caught.value, RuntimeError | ValueError), "code that knows nothing of us catches it too"
    return str(caught.value)


def _copies(module: nn.Module) -> bool:
    return all(parameter.layout is torch.strided and not parameter.is_quantized for parameter in module.parameters())


def assert_usable(module: ProbeModule, **options: Any) -> None:
    """Raise unless the module trains as a fresh one would."""
    trainer("cpu", SuperpipeStrategy(k=2), max_epochs=1, **options).fit(module)
    assert len(module.losses) == 4
