"""Wire dtype: the dtype in which parameters cross the link and compute, where it is not their own.

The host keeps parameters as they are: they are the masters, which optimizers, checkpoints and state dicts see. What the
device sees is what ``module.to(dtype)`` would have made of the module: floating-point parameters and buffers in the
wire dtype, all others as they are. As weights are of that dtype, so are the floating-point tensors that units, and
modules around units, are called with (the rule of FSDP2's ``cast_forward_inputs``); what they return is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["HALVES", "Wire"]

HALVES = (torch.float16, torch.bfloat16)
"""Floating-point dtypes of 2 bytes."""

_CAST = (torch.float32, torch.float64)
_INPUTS = (*HALVES, *_CAST)


class Wire:
    """Says which dtype a host tensor has on the device.

    Args:
        dtype: the wire dtype, a floating-point one of 2 bytes; None leaves all as they are.

    >>> wire = Wire(torch.bfloat16)
    >>> wire.dtype_of(torch.ones(1)), wire.dtype_of(torch.ones(1, dtype=torch.int32))
    (torch.bfloat16, torch.int32)
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype of a host tensor's device copy."""
        return self.dtype if self.dtype is not None and tensor.dtype in _CAST else tensor.dtype

    def casts(self, tensor: Tensor) -> bool:
        """Whether a host tensor changes its dtype on the way to the device."""
        return self.dtype_of(tensor) is not tensor.dtype

    def num_bytes(self, tensor: Tensor) -> int:
        """Bytes of a host tensor's device copy."""
        return tensor.numel() * self.dtype_of(tensor).itemsize

    def converted(self, tensor: Tensor) -> Tensor:
        """A host tensor in the dtype of its device copy: itself, if that is the same."""
        return tensor.to(self.dtype_of(tensor))

    def inputs(self, values: Any) -> Any:
        """Cast the floating-point tensors that a module is called with; containers without any are passed on.

        Differentiable, as in the module that it stands for.
        """

        def is_cast(leaf: Any) -> bool:
            return isinstance(leaf, Tensor) and leaf.dtype in _INPUTS and leaf.dtype is not self.dtype

        if self.dtype is None or not any(map(is_cast, tree_leaves(values))):
            return values
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype) if is_cast(tensor) else tensor, values)
