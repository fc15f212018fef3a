"""Casts that autocast caches: one for all calls of a unit, their memory let go between calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from tests.engine.tiny import CPU, WIDTH, Chain, batches, chain, open_engine


class Again(Chain):
    """Calls its blocks twice, so that two calls share one cast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Keeps(nn.Module):
    """Keeps its weight, converted, where others find it."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        converted = self.weight.to(torch.bfloat16)
        self.kept.append(converted)
        return x + (x.to(torch.bfloat16) @ converted).float()


def twice() -> Again:
    torch.manual_seed(0)
    return Again(4)


def bfloat16(device: torch.device = CPU) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def gradients(module: nn.Module) -> list[Tensor]:
    return [cast(Tensor, parameter.grad).cpu() for parameter in module.parameters()]


def run(module: nn.Module, engine: Engine | None, device: torch.device, *, is_outer: bool) -> list[Tensor]:
    """Sum the losses of two forwards, differentiate, evaluate; maybe all forwards share one autocast block."""

    def step(mode: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if engine is None else engine.step(mode)

    x = batches(1)[0].to(device)
    loss = torch.zeros((), device=device)
    with bfloat16(device) if is_outer else contextlib.nullcontext():
        for scale in (1.0, 2.0):
            with step("train"), bfloat16(device):
                loss = loss + module(x * scale).float().pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with step("validate"), torch.no_grad(), bfloat16(device):
            output = module(x)
    return [loss.detach().cpu(), *gradients(module), output.cpu()]


@pytest.mark.parametrize("is_outer", [False, True], ids=["a block each", "one block"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_calls_that_share_a_cast_are_exact(k: int, is_outer: bool) -> None:
    expected, module = run(twice(), None, CPU, is_outer=is_outer), twice()
    with open_engine(module, ThreadLanes(CPU, None, max_delay_ms=0.2), k=k) as engine:
        for _ in range(2):
            module.zero_grad()
            assert all(map(torch.equal, run(module, engine, CPU, is_outer=is_outer), expected))


@pytest.mark.emu
@pytest.mark.parametrize("is_outer", [False, True], ids=["a block each", "one block"])
def test_calls_that_share_a_cast_are_exact_on_a_separate_device(emu: torch.device, is_outer: bool) -> None:
    expected, module = run(twice().to(emu), None, emu, is_outer=is_outer), twice()
    with open_engine(module, ThreadLanes(emu, None), k=1) as engine:
        assert all(map(torch.equal, run(module, engine, emu, is_outer=is_outer), expected))


@pytest.fixture
def module() -> Chain:
    return chain(4)


@pytest.fixture
def engine(module: Chain) -> Iterator[Engine]:
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        yield engine


def bytes_without_memory(engine: Engine) -> int:
    """Bytes that casts in the cache would take if they had kept their memory."""
    emptied = engine.casts._emptied
    return sum(engine.units[i].parameters[c.position].numel() * 2 for i, casts in emptied.items() for c in casts)


def test_memory_of_casts_goes_with_their_unit(module: Chain, engine: Engine) -> None:
    matrices = sum(2 * parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    with engine.step("train"), bfloat16():
        module(batches(1)[0])
        assert bytes_without_memory(engine) >= matrices


def test_nothing_is_kept_once_autocast_has_ended(module: Chain, engine: Engine) -> None:
    for _ in range(3):
        with engine.step("train"):
            with bfloat16():
                loss = module(batches(1)[0]).float().sum()
            loss.backward()
    with engine.step("train"):
        assert bytes_without_memory(engine) == 0


def test_cast_that_a_user_keeps_keeps_its_bytes() -> None:
    def converted(is_streamed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        kept: list[Tensor] = []
        module = Chain(0)
        module.blocks.extend(Keeps(kept) for _ in range(4))
        with contextlib.ExitStack() as scopes:
            if is_streamed:
                engine = scopes.enter_context(open_engine(module, ThreadLanes(CPU, None)))
                scopes.enter_context(engine.step("train"))
            with bfloat16():
                module(batches(1)[0]).float().sum().backward()
            return [tensor.detach().clone() for tensor in kept]

    assert all(map(torch.equal, converted(True), converted(False)))
