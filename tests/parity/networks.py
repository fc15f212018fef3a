"""Networks whose order of units is not a chain: skips, and paths chosen by the data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["INPUT_WIDTH", "Router", "UNet"]

INPUT_WIDTH = 32


class ConvBlock(nn.Module):
    """Convolution, group norm, activation, dropout: (N, C, H, W) -> (N, D, H, W)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm = nn.GroupNorm(2, num_out)
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(F.silu(self.norm(self.conv(x)))))


class UNet(nn.Module):
    """Down and up again, with skips: an early output is read by a late unit, from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([ConvBlock(3, 8), ConvBlock(8, 12), ConvBlock(12, 16)])
        self.middle = ConvBlock(16, 16)
        self.ups = nn.ModuleList([ConvBlock(16 + 16, 12), ConvBlock(12 + 12, 8), ConvBlock(8 + 8, 8)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        x, skips = pixel_values, []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up in self.ups:
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return SimpleNamespace(loss=F.mse_loss(self.head(x), pixel_values))


class Router(nn.Module):
    """Chooses its path by the data: one of two experts per batch, and an early exit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUT_WIDTH, INPUT_WIDTH)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(INPUT_WIDTH, INPUT_WIDTH), nn.GELU()) for _ in range(6))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(INPUT_WIDTH, 4)

    def forward(self, x: Tensor) -> SimpleNamespace:
        x = self.embed(x)
        for depth in range(3):
            chosen = 2 * depth + int(x.mean().item() > 0)
            x = x + self.dropout(self.experts[chosen](x))
            if depth == 1 and x[0, 0].item() > 0.5:
                break
        return SimpleNamespace(loss=cast(Tensor, self.head(x)).pow(2).mean())
