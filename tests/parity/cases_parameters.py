"""Kinds of parameters: written in forward, oddly laid out, of odd types, with odd gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.parity.probe import WIDTH, Block, ProbeModule, probe


class ClampsWeight(Block):
    """Writes its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


@probe()
class WeightWrittenInForward(ProbeModule):
    """A weight changed in forward has to reach the host before the unit goes."""

    def build(self) -> None:
        self.blocks[2] = ClampsWeight()


@probe()
class EmbeddingMaxNorm(ProbeModule):
    """An embedding with `max_norm` rescales rows of its own table in forward."""

    def build(self) -> None:
        self.tables = nn.ModuleList(nn.Embedding(8, WIDTH, max_norm=1.0, padding_idx=0) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(4, device=x.device)
        return super().forward(x + self.tables[0](rows) * self.tables[1](rows + 2))


@probe()
class ChannelsLast(ProbeModule):
    """Weights keep their strides: other strides choose other kernels, which round differently."""

    def build(self) -> None:
        def stage(index: int) -> nn.Module:
            first = nn.Conv2d(1 if index == 0 else 4, 4, 3, padding=1)
            return nn.Sequential(first, nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))

        stages = nn.Sequential(*[stage(index) for index in range(3)])
        self.stages = cast(nn.Module, stages.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.turned = nn.Linear(WIDTH, WIDTH)
        self.turned.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x.view(4, 1, 4, 4)).mean(1).flatten(1)
        return super().forward(self.turned(x))


class OddParameters(nn.Module):
    """Scalar, empty, integer, frozen and double-precision parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, WIDTH))
        self.rows = nn.Parameter(torch.arange(WIDTH).flip(0), requires_grad=False)
        self.fixed = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.precise = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)[:, self.rows] * self.scalar * self.fixed + self.empty.sum()
        return cast(Tensor, (y * self.precise).float())


@probe()
class OddShapesAndTypes(ProbeModule):
    """One slot holds tensors of several dtypes, none, one or many elements."""

    def build(self) -> None:
        self.units = nn.ModuleList(OddParameters() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return super().forward(x)


class Fourier(nn.Module):
    """Complex weights and an embedding bag."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.bag = nn.EmbeddingBag(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.ifft(torch.fft.fft(x) * self.weight).real
        return cast(Tensor, y + self.bag(torch.zeros(4, 2, dtype=torch.long, device=x.device)))


@probe()
class ComplexWeights(ProbeModule):
    """Complex parameters have views of another dtype and conjugate bits."""

    def build(self) -> None:
        self.units = nn.ModuleList(Fourier() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return super().forward(x)


@probe(devices=("cpu",), gap="the emulated device has no sparse tensors")
class SparseGradients(ProbeModule):
    """An embedding with sparse gradients: what comes home is no dense tensor."""

    def build(self) -> None:
        self.tables = nn.ModuleList(nn.Embedding(8, WIDTH, sparse=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([0, 3, 3, 7], device=x.device)
        return super().forward(x + self.tables[0](rows) * self.tables[1](rows))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)
