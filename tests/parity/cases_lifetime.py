"""Copies, pickles, exceptions, freezing, late modules, threads: what happens to a module around its steps."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from tests.parity.probe import WIDTH, Block, ProbeModule, probe


def ones(module: L.LightningModule) -> Tensor:
    """Return an input of shape (2, WIDTH) where the module computes."""
    return torch.ones(2, WIDTH, device=module.device)


class OwnAverage(Callback):
    """Moving average in a deep copy, evaluated after every batch."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.copy = copy.deepcopy(pl_module).to(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        with torch.no_grad():
            for average, parameter in zip(self.copy.parameters(), pl_module.parameters(), strict=True):
                average.lerp_(parameter.to(average.device), 0.1)
        cast(ProbeModule, pl_module).record("average", self.copy(ones(pl_module)))


@probe(callbacks=lambda device: [OwnAverage()])
class OwnMovingAverage(ProbeModule):
    """A deep copy made while the strategy runs is an ordinary model."""


@probe(callbacks=lambda device: [EMAWeightAveraging(decay=0.9)])
class LightningMovingAverage(ProbeModule):
    """Lightning's averaging keeps a copy and swaps the weights for validation."""


@probe(callbacks=lambda device: [StochasticWeightAveraging(1e-2, swa_epoch_start=1)], max_epochs=4)
class StochasticAveraging(ProbeModule):
    """Weights are replaced by their average at the end, and statistics updated by forwards without training."""


@probe()
class CopiedInStep(ProbeModule):
    """State dict, deep copy and pickle in the middle of a step see host weights and original classes."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        state = {name: value.clone() for name, value in self.state_dict().items()}
        self.record("state", torch.cat([value.flatten() for value in state.values()]))
        copied = copy.deepcopy(self.blocks).to(self.device)
        self.record("copy", copied[1](batch))
        thawed = pickle.loads(pickle.dumps(self.blocks))
        assert type(thawed[0]) is Block and type(thawed[0].up) is nn.Linear
        return super().training_step(batch, batch_idx)


class RaisesWhenTold(Block):
    """Raises after it computed."""

    told = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.told:
            raise ValueError("raised by the probe in forward")
        return y


@probe()
class ExceptionInForward(ProbeModule):
    """A unit raises and the user catches it: nothing stays bound, the next step is exact."""

    def build(self) -> None:
        self.raising = RaisesWhenTold()
        self.blocks[2] = self.raising

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.raising.told = True
        try:
            self(batch)
        except ValueError:
            self.record("caught", 1)
        self.raising.told = False
        held = set(self.trainer.optimizers[0].param_groups[0]["params"])
        assert all(isinstance(p, nn.Parameter) and p in held for p in self.parameters())
        return super().training_step(batch, batch_idx)


@probe(max_epochs=3)
class FrozenMidway(ProbeModule):
    """A unit is frozen for one epoch and thawed again."""

    def on_train_epoch_start(self) -> None:
        self.blocks[1].requires_grad_(self.current_epoch != 1)


@probe()
class FrozenInputSide(ProbeModule):
    """The first units are frozen: backward stops early, they never come back."""

    def build(self) -> None:
        self.embed.requires_grad_(False)
        self.blocks[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


@probe(callbacks=lambda device: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)], max_epochs=3)
class BackboneThawed(ProbeModule):
    """A callback freezes most units, and adds them to the optimizer as a new group later."""

    @property
    def backbone(self) -> nn.Module:
        return self.blocks

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


class OwnBackward(Callback):
    """Runs forward and backward of its own before each step."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module = cast(ProbeModule, pl_module)
        module(batch).pow(2).mean().backward()
        module.record("gradient", cast(Tensor, module.block(0).up.weight.grad))
        module.zero_grad()


@probe(callbacks=lambda device: [OwnBackward()])
class BackwardInCallback(ProbeModule):
    """Forward and backward outside any step of the loop."""


class InThread(Callback):
    """Evaluates the module in another thread."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        module = cast(ProbeModule, pl_module)
        thread = threading.Thread(target=lambda: module.record("from a thread", module(ones(module))))
        module.eval()
        thread.start()
        thread.join()
        module.train()


@probe(callbacks=lambda device: [InThread()])
class ForwardInThread(ProbeModule):
    """A forward in a thread that is not the loop's."""


@probe(max_epochs=3)
class LateModules(ProbeModule):
    """A unit and a layer inside a unit are added between epochs."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(5)
            self.blocks.append(Block().to(self.device))
            cast(Any, self.blocks[0]).late = nn.Linear(WIDTH, WIDTH).to(self.device)
            self.trainer.strategy.optimizers = [self.adamw()]


@probe()
class DataReassigned(ProbeModule):
    """`parameter.data` is replaced by new tensors, which no version counter shows."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.clone() * 0.99


@probe()
class DataWritten(ProbeModule):
    """Weights are swapped for others through `.data` and back, a tied one among them."""

    def build(self) -> None:
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def on_validation_start(self) -> None:
        self.kept = [parameter.data.clone() for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.data.mul_(0.5)

    def on_validation_end(self) -> None:
        for parameter, value in zip(self.parameters(), self.kept, strict=True):
            parameter.data.copy_(value)
        self.kept = []


@probe()
class UserMovesModule(ProbeModule):
    """`self.to(self.device)` in a hook would pull all weights to the device for good."""

    def on_train_start(self) -> None:
        self.to(self.device)


@probe()
class ConfiguredLate(ProbeModule):
    """Blocks are made in `configure_model`, inside the strategy's own initialisation context."""

    def build(self) -> None:
        self.blocks = nn.ModuleList()

    def configure_model(self) -> None:
        if not len(self.blocks):
            self.blocks.extend(Block() for _ in range(3))


@probe()
class TeacherWithoutGradient(ProbeModule):
    """The same units run in evaluation without gradients inside a training step, then with gradients."""

    def loss(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().loss(x)
        self.eval()
        with torch.no_grad():
            target = self(x * 0.9)
        self.train()
        return cast(Tensor, (self(x) - target).pow(2).mean())


@probe()
class InferenceModeInStep(ProbeModule):
    """A forward under `inference_mode` inside the step must not leave inference tensors in any slot."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        with torch.inference_mode():
            self.record("inference", self(batch))
        return super().training_step(batch, batch_idx)


@probe(devices=("emu",), gap="host memory has no limit that a test could set")
class OutOfMemoryCaught(ProbeModule):
    """The user catches an out-of-memory error in forward or backward and goes on with the next step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        from tests.emu import capacity, used_bytes

        for spare_bytes in (300, 1_500, 4_000, 7_000):
            with capacity(used_bytes() + spare_bytes):
                try:
                    self.loss(batch).backward()
                except torch.OutOfMemoryError:
                    self.record("caught", spare_bytes)
            self.zero_grad()
        torch.manual_seed(batch_idx)  # how many numbers were drawn depends on where the memory ended
        return super().training_step(batch, batch_idx)
