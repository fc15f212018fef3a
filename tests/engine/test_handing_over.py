"""Where device and host share memory, a gradient that is final is home; nobody's memory is taken for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.config import Link
from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.lanes import Label
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.tiers import HostTier
from tests.engine.tiny import CPU, open_engine

LABEL = Label("G", 3, "net.h.3")


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_a_gradient_is_home_at_once_where_device_and_host_share_memory() -> None:
    lanes, tier = ThreadLanes(CPU, None), HostTier(pin=False)
    home = GradientReturn(lanes, tier, limit_bytes=256, pin=False)
    parameter, gradient = nn.Parameter(torch.zeros(64)), torch.ones(64)
    address, threads = gradient.data_ptr(), threading.active_count()
    home.ship(parameter, gradient, LABEL)
    assert grad_of(parameter).data_ptr() == address and home.in_flight_bytes == 256
    home.ship(parameter, torch.full((64,), 2.0), LABEL)
    home.finish()
    assert grad_of(parameter).eq(3).all() and home.in_flight_bytes == 0
    assert (lanes.d2h_bytes, tier.allocated_bytes, threading.active_count()) == (512, 0, threads)


class GivesItsWeight(torch.autograd.Function):
    """A backward that hands out what it saved as a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return gradients[0], weight


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = GivesItsWeight.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


@pytest.mark.parametrize("link", [None, Link()], ids=["shared", "copied"])
def test_a_gradient_that_is_the_weight_itself_survives_the_next_unit_in_its_slot(link: Link | None) -> None:
    module = nn.Sequential(*[Scaled() for _ in range(5)])
    expected = [parameter.detach().clone() for parameter in module.parameters()]
    with open_engine(module, ThreadLanes(CPU, link), k=1) as engine:
        with engine.step("train"):
            module(torch.randn(2, 8)).sum().backward()
        found = [grad_of(parameter) for parameter in module.parameters()]
        assert all(map(torch.equal, found, expected))
