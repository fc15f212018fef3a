"""Scratch: device memory for one unit's gradients, states and weights during its update, used again and again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_superpipe.engine.slots import aligned
from lightning_superpipe.optimizer.masters import wants_master
from lightning_superpipe.optimizer.state_size import state_tensor_sizes
from lightning_superpipe.partition.anchors import is_dense

__all__ = ["NUM_SETS", "Scratch", "kernel_bytes_of", "scratch_bytes_of"]

NUM_SETS = 2
"""One unit's tensors travel while those of the other are used."""


class Scratch:
    """Device memory of one size, carved anew for each unit.

    Args:
        poison: fill it with NaN bytes before each use.
    """

    def __init__(self, device: torch.device, num_bytes: int, *, poison: bool) -> None:
        with torch.inference_mode(False):
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._poison = poison
        self._end = 0

    def clear(self) -> None:
        """Begin with another unit."""
        self._end = 0
        if self._poison:
            self._buffer.fill_(255)

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory shaped as a tensor, contiguous where that is not dense; its contents are stale."""
        dtype = dtype or tensor.dtype
        start, num_bytes = self._end, tensor.numel() * dtype.itemsize
        self._end += aligned(num_bytes)
        assert self._end <= self._buffer.numel(), "whoever takes a scratch has asked for its size"
        typed = self._buffer[start : start + num_bytes].view(dtype)
        return typed.as_strided(tensor.size(), tensor.stride()) if is_dense(tensor) else typed.view(tensor.size())


def kernel_bytes_of(parameters: Iterable[Tensor]) -> int:
    """Bytes that kernels which are not fused make beside the scratch of a unit with these parameters, at most."""
    return 2 * sum(4 * parameter.numel() for parameter in parameters)


def scratch_bytes_of(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer], *, with_masters: bool) -> int:
    """Bytes of scratch that the update of a unit with these parameters takes: weights, gradients, states, masters and
    gradients cast.
    """
    own = {id(parameter) for parameter in parameters}
    num_bytes = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in own and (parameter.requires_grad or parameter.grad is not None):
                    has_master = with_masters and wants_master(parameter)
                    wide = 4 if has_master else parameter.itemsize
                    sizes = [
                        2 * [parameter.nbytes],
                        [size * wide for size in state_tensor_sizes(optimizer, group, parameter)],
                    ]
                    sizes.append(2 * [parameter.numel() * wide] if has_master else [])
                    num_bytes += sum(aligned(size) for kind in sizes for size in kind)
    return num_bytes
