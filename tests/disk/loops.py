"""A model, a loop, and all that it leaves behind."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe import attach

WIDTH, NUM_BLOCKS = 48, 6
EVERYTHING = {"weights": "disk", "states": "disk", "gradients": "disk", "activations": "disk"}


class Left(NamedTuple):
    """What a loop left: losses, weights, and states in the optimizer's order."""

    losses: list[float]
    weights: list[Tensor]
    states: list[Tensor]

    def equals(self, other: Left) -> bool:
        mine, others = (*self.weights, *self.states), (*other.weights, *other.states)
        same = len(mine) == len(others) and all(map(torch.equal, mine, others))
        return self.losses == other.losses and same


class Block(nn.Module):
    """Two matrices and a norm: tensors of several sizes in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + down


class Model(nn.Module):
    """Blocks, and a scale that is an anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x * self.scale)
        return x


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model().to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    number: int,
    *,
    clip: float | None = None,
    announced_by: Any = None,
) -> float:
    """One training step on the batch of this number; announced, where what is attached to the model is given."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)
    loss: Tensor = model(x).float().pow(2).mean()
    with contextlib.nullcontext() if announced_by is None else announced_by.updating(optimizer):
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def left(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float] | None = None) -> Left:
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return Left(losses or [], [parameter.detach().clone() for parameter in model.parameters()], states)


def train(options: dict[str, Any] | None, *, steps: int = 4, clip: float | None = None) -> Left:
    """Train; without options nothing streams."""
    model, optimizer = make()
    if options is None:
        return left(model, optimizer, [step(model, optimizer, number, clip=clip) for number in range(steps)])
    with attach(model, optimizer, device="cpu", **{"k": 2, **options}):
        losses = [step(model, optimizer, number, clip=clip) for number in range(steps)]
    return left(model, optimizer, losses)
