"""Parameters read outside the unit that holds them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.probe import WIDTH, Block, ProbeModule, probe


@probe()
class FunctionalRead(ProbeModule):
    """A weight used through `F.linear` far from its module is tied by use, not by registration."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        return cast(Tensor, self.head(F.linear(hidden, self.embed.weight.t())))


@probe()
class BlockWeightRead(ProbeModule):
    """Weights of two blocks are operands between unit calls, as transposed views."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        return cast(Tensor, self.head(hidden @ self.block(1).up.weight.t() @ self.block(2).down.weight.t()))


@probe()
class HeldReference(ProbeModule):
    """A parameter is fetched before its unit runs and used after it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.block(3).up.weight
        hidden = self.trunk(x)
        return cast(Tensor, self.head(hidden + (hidden @ weight.t())[:, :WIDTH]))


@probe()
class RegularisationLoss(ProbeModule):
    """A loss over all parameters reads every weight outside its unit."""

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + 1e-3 * cast(Tensor, sum(p.pow(2).sum() for p in self.parameters()))


class Encoder(nn.Module):
    """Is used through a method that is not ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def encode(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.last(x))


class Projection(nn.Module):
    """A block whose own parameter is used through a method that is not ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def encode(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x @ self.weight))


@probe()
class MethodCall(ProbeModule):
    """`module.encode(x)` runs below every wrapper of `__call__`, on a container and on single units."""

    def build(self) -> None:
        self.encoder = Encoder()
        self.projections = nn.ModuleList(Projection() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder.encode(x)
        for projection in self.projections:
            x = cast(Projection, projection).encode(x)
        return super().forward(x)


@probe()
class MetadataRead(ProbeModule):
    """A parent looks at dtype and device of its units' parameters, which must not count as a read."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.block(0).up.weight.dtype).to(self.device))


class OwnLists(nn.Module):
    """A block that keeps its matrices in a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"a": nn.Parameter(torch.eye(WIDTH)), "b": nn.Parameter(torch.ones(WIDTH))})
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x @ self.weights["a"] * self.weights["b"]))


@probe()
class ParameterLists(ProbeModule):
    """ParameterList and ParameterDict are modules that are never called, at the root and inside units."""

    def build(self) -> None:
        self.matrices = nn.ParameterList(nn.Parameter(torch.eye(WIDTH)) for _ in range(3))
        self.deep = nn.Sequential(OwnLists(), OwnLists())

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = x @ matrix
        return super().forward(self.deep(x))


@probe(gradient_clip_val=0.05)
class TiedHead(ProbeModule):
    """One Parameter in two modules: both gradients add up, the norm counts it once."""

    def build(self) -> None:
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight


@probe(gradient_clip_val=0.05)
class TiedHeadFused(TiedHead):
    """A fused update leaves `_version` alone, so a copy that stays on the device must be refreshed by other means."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.adamw(fused=True)


@probe()
class RootParameters(ProbeModule):
    """Parameters and buffers of the root itself; the buffer is written in the step and read in validation."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.running: Tensor
        self.register_buffer("running", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x) * self.scale
        if self.training:
            self.running.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return cast(Tensor, self.head(hidden - self.running))


@probe(accumulate_grad_batches=2)
class LateRead(ProbeModule):
    """The first read outside comes when optimizer state exists and gradients of the unit are half accumulated."""

    def loss(self, x: Tensor) -> Tensor:
        loss = super().loss(x)
        if self.global_step > 1:
            loss = loss + F.linear(x, self.block(1).down.weight.t()).pow(2).mean()
        return loss


@probe(accumulate_grad_batches=3, max_epochs=3)
class ManyReads(ProbeModule):
    """One weight is used four times outside and once inside its unit: the gradient is a sum in autograd's order."""

    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = self.blocks[index](x) + F.linear(x, self.embed.weight) * 0.1
        return cast(Tensor, self.head(self.embed(x)))


@probe()
class EvaluationRead(ProbeModule):
    """The read outside happens in validation only, where no training step could have announced it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = F.linear(x, self.block(2).down.weight.t())[:, :WIDTH]
        return super().forward(x)
