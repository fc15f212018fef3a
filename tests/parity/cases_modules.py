"""Kinds of modules and parameters that a unit may contain."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.parity.probe import WIDTH, Block, ProbeModule, probe


class ReadsOwnParameters(Block):
    """Iterates over its own parameters in forward."""

    def forward(self, x: Tensor) -> Tensor:
        mean = sum(parameter.mean() for _, parameter in self.named_parameters())
        return super().forward(x) + mean + next(self.parameters()).dtype.itemsize


@probe()
class NamedParametersInUnit(ProbeModule):
    """`named_parameters()` inside a unit's forward yields what can be computed with."""

    def build(self) -> None:
        self.blocks.append(ReadsOwnParameters())


@probe(inherent="inside a unit, `module.weight` is the twin and not the object that the optimizer holds")
class IdentityInsideUnit(ProbeModule):
    """A hook looks parameters up by identity."""

    def build(self) -> None:
        known = {id(parameter) for parameter in self.parameters()}
        self.seen: list[bool] = []
        up = self.block(1).up
        up.register_forward_pre_hook(lambda module, args: self.seen.append(id(module.weight) in known))

    def on_train_end(self) -> None:
        self.record("all known", all(self.seen))


@probe(inherent="`type(module) is nn.Linear` is false while a strategy runs, `isinstance` holds")
class ExactTypes(ProbeModule):
    """Classes are swapped while the strategy runs."""

    def on_fit_start(self) -> None:
        self.record("exact", sum(type(module) is nn.Linear for module in self.modules()))

    def on_train_end(self) -> None:
        assert sum(isinstance(module, nn.Linear) for module in self.modules()) == 10


@probe()
class Reparametrised(ProbeModule):
    """Weight norm, old and new, and spectral norm compute the weight in forward; the latter writes buffers there."""

    def build(self) -> None:
        weight_norm(self.block(0).up)
        spectral_norm(self.block(1).down)
        nn.utils.weight_norm(self.block(2).up)


@probe(max_epochs=3)
class ParametrisedMidway(ProbeModule):
    """A unit's class, parameters and submodules change between epochs."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            weight_norm(self.block(0).up)
            self.trainer.strategy.optimizers = [self.adamw()]


def _prune(device: str) -> list[ModelPruning]:
    return [ModelPruning("l1_unstructured", amount=0.2, use_global_unstructured=True, parameters_to_prune=None)]


@probe(callbacks=_prune)
class Pruned(ProbeModule):
    """Pruning sets `module.weight` to a plain tensor in a pre-forward hook and masks it with a buffer."""


@probe()
class Attention(ProbeModule):
    """Attention and encoder layers read their children's weights; in evaluation they take a fast path."""

    def build(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x[None])
        return super().forward(self.attention(x, x, x, need_weights=False)[0][0])


@probe()
class Recurrent(ProbeModule):
    """Recurrent layers keep a second list of their weights."""

    def build(self) -> None:
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.1)
        self.gru = nn.GRU(WIDTH, WIDTH, bidirectional=True)
        self.projected = nn.LSTM(2 * WIDTH, WIDTH, proj_size=WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.projected(self.gru(self.lstm(x[:, None])[0])[0])[0]
        return super().forward(torch.cat([y, y], -1)[:, 0])


@probe()
class RegisteredTwice(ProbeModule):
    """One module under several names, used at two places of the order."""

    def build(self) -> None:
        self.blocks.append(self.blocks[0])
        self.alias = self.blocks[1]


class CallsOther(Block):
    """Calls another unit from inside its forward."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]  # in a list: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.other[0](x))


@probe()
class NestedCall(ProbeModule):
    """A unit calls another one: with a small window the caller itself has to leave and come back."""

    def build(self) -> None:
        self.blocks[3] = CallsOther(self.blocks[0])


@probe()
class BatchNorm(ProbeModule):
    """Running statistics are buffers, written by kernels that leave `_version` alone."""

    def build(self) -> None:
        def stage() -> nn.Module:
            return nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 1, 1))

        self.stages = nn.Sequential(*[stage() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stages(x[:, None])[:, 0])


@probe()
class LazyLinear(ProbeModule):
    """A lazy layer changed its class when it was first called, before the Trainer saw it."""

    def build(self) -> None:
        self.lazy = nn.LazyLinear(WIDTH)
        self.lazy(torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lazy(x))


@probe()
class UnusedUnit(ProbeModule):
    """A unit that never runs keeps `grad=None`, so weight decay must not touch it."""

    def build(self) -> None:
        self.unused = Block()

    def on_after_backward(self) -> None:
        self.record("no gradient", [p.grad is None for p in self.unused.parameters()].count(True))


@probe(accumulate_grad_batches=2)
class RandomDepth(ProbeModule):
    """Units are skipped at random: the order never repeats, gradients stay None for some."""

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if not self.training or torch.rand(()).item() < 0.5:
                x = block(x)
        return x
