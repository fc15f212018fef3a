"""Units that were compiled, traced, scripted or exported."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.parity.probe import WIDTH, ProbeModule, probe

BACKEND = "aot_eager"  # the whole tracing machinery without a compiler


@probe(once=True)
class CompiledBlocks(ProbeModule):
    """`torch.compile(block)` wraps a unit, `block.compile()` replaces its inner call."""

    def build(self) -> None:
        self.blocks[1] = cast(nn.Module, torch.compile(self.blocks[1], backend=BACKEND))
        self.blocks[2].compile(backend=BACKEND)


@probe(once=True)
class CompiledInside(ProbeModule):
    """A compiled layer inside a unit, and a compiled function that calls a unit."""

    def build(self) -> None:
        self.block(1).up = cast(nn.Linear, torch.compile(self.block(1).up, backend=BACKEND))
        self.call = torch.compile(lambda module, x: module(x), backend=BACKEND)

    def trunk(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.call(self.blocks[0], super().trunk(x)))


@probe(once=True)
class CompiledRoot(ProbeModule):
    """The whole forward is compiled: every unit call is a graph break."""

    def build(self) -> None:
        self.compiled_forward: Any = torch.compile(super().forward, backend=BACKEND)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.compiled_forward(x))


HOST_INPUT = torch.ones(2, WIDTH)


class HandsOutBlock(ProbeModule):
    """Base of the probes that hand a unit to a compiler on the host, while the strategy still runs."""

    def hand_out(self, block: nn.Module) -> Tensor:
        raise NotImplementedError

    def on_train_end(self) -> None:
        block = self.block(0).eval().cpu()
        self.record("handed out", self.hand_out(block))
        block.to(self.device).train()


@probe()
class Traced(HandsOutBlock):
    """Tracing a unit must not bake a slot's memory in: the trace is run after the slot was used by others."""

    def hand_out(self, block: nn.Module) -> Tensor:
        traced = torch.jit.trace(block, HOST_INPUT)  # type: ignore[no-untyped-call]
        block.to(self.device)
        self(HOST_INPUT.to(self.device))
        block.cpu()
        return cast(Tensor, traced(HOST_INPUT))


@probe()
class Scripted(HandsOutBlock):
    """Scripting a unit reads its class."""

    def hand_out(self, block: nn.Module) -> Tensor:
        return cast(Tensor, torch.jit.script(block)(HOST_INPUT))


@probe()
class Exported(HandsOutBlock):
    """`torch.export` of a unit gives a program over its parameters."""

    def hand_out(self, block: nn.Module) -> Tensor:
        return cast(Tensor, torch.export.export(block, (HOST_INPUT,)).module()(HOST_INPUT))
