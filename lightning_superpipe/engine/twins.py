"""Twins: device parameters that stand for host parameters inside modules and in autograd's graph."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.gradients import accumulate
from lightning_superpipe.engine.lanes import Label

__all__ = ["GradientReceiver", "make_twin", "release_memory"]


class GradientReceiver(Protocol):
    """Who takes finished gradients; graphs outlive it, so twins hold it weakly."""

    is_open: bool

    def receive_gradient(self, host: nn.Parameter, gradient: Tensor, label: Label) -> None:
        """Send a gradient home to its host parameter."""


def make_twin(
    host: nn.Parameter,
    device: torch.device,
    receiver: GradientReceiver,
    label: Label,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """Return a device parameter without memory, whose gradients go to ``host`` once autograd has finished them.

    Args:
        dtype: of the twin; None is the host's.
    """
    with raw_tensors():
        # Not from an existing tensor: Parameter(x) shares x's version counter, and every later copy into x would look
        # like a write by the user.
        twin = nn.Parameter(torch.empty(0, dtype=dtype or host.dtype, device=device), requires_grad=False)
        twin.__dict__ = host.__dict__  # attributes that people hang on parameters: one dict for both
        if host.is_floating_point() or host.is_complex():
            twin.requires_grad_(True)  # hooks need it; the host's own value is set at each use
            _send_gradients_home(twin, host, receiver, label)
            twin.requires_grad_(host.requires_grad)
    return twin


def _send_gradients_home(twin: nn.Parameter, host: nn.Parameter, receiver: GradientReceiver, label: Label) -> None:
    receiver_ref = weakref.ref(receiver)

    def ship(twin: Tensor) -> None:
        gradient, twin.grad = twin.grad, None
        receiver = receiver_ref()
        if gradient is None:
            return
        if receiver is None or not receiver.is_open:
            accumulate(host, gradient.to(host.device, host.dtype))  # backward after teardown
        else:
            receiver.receive_gradient(host, gradient, label)

    twin.register_post_accumulate_grad_hook(ship)  # type: ignore[no-untyped-call]


def release_memory(twin: nn.Parameter, size: torch.Size) -> None:
    """Let a twin keep its shape but no memory: graphs that are still alive may hold it for ever."""
    with raw_tensors():
        twin.data = torch.empty((), dtype=twin.dtype, device=twin.device).expand(size)
