"""Units called several times, activation checkpointing by the user, saved tensors moved by the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parity.probe import ProbeModule, SquareWeight, probe

NUM_ROUNDS = 3


@probe()
class ReusedUnit(ProbeModule):
    """Each block is called three times per forward: in other slots, with one gradient."""

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(NUM_ROUNDS):
            for block in self.blocks:
                x = block(x)
        return x


@probe(accumulate_grad_batches=2)
class ReusedUnitAccumulated(ReusedUnit):
    """As above, with micro-batches: the order of all additions is autograd's."""


@probe(accumulate_grad_batches=2)
class ReentrantReused(ProbeModule):
    """Reentrant checkpoints accumulate one by one; a partial sum over them rounds differently."""

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(NUM_ROUNDS):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
        return x


@probe(accumulate_grad_batches=2)
class NonReentrantReused(ProbeModule):
    """Non-reentrant checkpoints own the saved-tensor hooks around each unit call."""

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(NUM_ROUNDS):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        return x


@probe()
class AroundSeveralUnits(ProbeModule):
    """One checkpoint spans more units than fit in the window, so the recomputation streams too; blocks 2 is in both."""

    def span(self, first: int, last: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for index in range(first, last):
                x = self.blocks[index](x)
            return x

        return run

    def trunk(self, x: Tensor) -> Tensor:
        x = cast(Tensor, checkpoint(self.span(0, 3), self.embed(x), use_reentrant=False))
        return cast(Tensor, checkpoint(self.span(2, 4), x, use_reentrant=True))


class ChecksItself(SquareWeight):
    """Checkpoints a function that reads the bare weight."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.tanh(F.linear(y, self.weight))

        return cast(Tensor, checkpoint(inner, self.linear(x), use_reentrant=False))


@probe()
class InsideUnit(ProbeModule):
    """The recomputation inside a unit reads `self.weight` with no module call that could load it."""

    def build(self) -> None:
        self.units = nn.ModuleList(ChecksItself() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return super().forward(x)


@probe()
class SaveOnCpu(ProbeModule):
    """The user's saved-tensor hooks around all units: ours must be innermost and hand the rest down."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


@probe()
class UserPackHooks(ProbeModule):
    """Hooks that change what is saved still see every activation, and no weight is lost to them."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return super().forward(x)
