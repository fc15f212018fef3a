"""Tiny modules, and one training loop that runs them plainly or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_superpipe.engine.activations import Choice
from lightning_superpipe.engine.engine import Engine, Window
from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.partition import partition
from lightning_superpipe.tiers import HostTier, Tier

WIDTH = 8
CPU = torch.device("cpu")

Step = Callable[[], contextlib.AbstractContextManager[object]]


class Block(nn.Module):
    """Two matrices and a norm, (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.dropout(self.down(F.gelu(self.up(self.norm(x))))))


class Chain(nn.Module):
    """Equal blocks, one unit each."""

    def __init__(self, num_blocks: int, *, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Result(NamedTuple):
    """What a training leaves behind."""

    losses: list[float]
    weights: list[Tensor]


def chain(num_blocks: int, *, seed: int = 0, **options: float) -> Chain:
    """Return a chain, always with the same weights."""
    torch.manual_seed(seed)
    return Chain(num_blocks, **options)  # type: ignore[arg-type]


def batches(num_batches: int, *, width: int = WIDTH) -> list[Tensor]:
    """Return the same random batches of shape (4, width) each time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, width, generator=generator) for _ in range(num_batches)]


def engine_of(
    root: nn.Module,
    lanes: Lanes,
    *,
    k: int = 2,
    k_prime: int = 1,
    poison: bool = True,
    seed: int | None = 0,
    choices: Sequence[Choice] | None = None,
    micro_batches: int = 1,
    tier: Tier | None = None,
) -> Engine:
    """Return an engine over the units that the partition finds."""
    found = partition(root)
    units = [(unit.name, unit.module) for unit in found.units]
    window = Window(k, k_prime, poison, seed)
    return Engine(
        root,
        units,
        found.anchors,
        window,
        lanes=lanes,
        tier=tier or HostTier(pin=False),
        root_scope=_no_scope,
        choices=choices,
        micro_batches=micro_batches,
    )


def _no_scope(kind: str) -> contextlib.AbstractContextManager[None]:
    """Tests open steps themselves."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def open_engine(root: nn.Module, lanes: Lanes, **options: Any) -> Iterator[Engine]:
    """Close the engine at the end, whatever happens."""
    engine = engine_of(root, lanes, **options)
    try:
        yield engine
    finally:
        engine.close()


def train(
    module: nn.Module,
    inputs: list[Tensor],
    step: Step = contextlib.nullcontext,
    around: Step = contextlib.nullcontext,
    *,
    fused: bool = False,
) -> Result:
    """Train with AdamW on the mean square of the output.

    Args:
        step: scope of each training step's forward.
        around: scope of each forward and backward.
    """
    options = {"fused": True} if fused else {"foreach": False}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]
    losses = []
    torch.manual_seed(2)
    for x in inputs:
        optimizer.zero_grad()
        with around():
            with step():
                loss = module(x).pow(2).mean()
            loss.backward()
        optimizer.step()
        losses.append(loss)
    with around():
        numbers = [loss.item() for loss in losses]
    return Result(numbers, [parameter.detach().clone() for parameter in module.parameters()])


def is_equal(left: Result, right: Result) -> bool:
    """Whether two trainings left the same numbers, bit for bit."""
    return left.losses == right.losses and all(map(torch.equal, left.weights, right.weights))
