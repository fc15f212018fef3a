"""A copy of a module whose tensors have sizes and dtypes but no memory, so that a step of any model can be played."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["StandIn"]

_Module = TypeVar("_Module", bound=nn.Module)


class StandIn:
    """Makes stand-ins for tensors of the host; those of one object compute with one another, and with real ones.

    Tensors that nothing stands in for are real: what a model makes of a batch's integers (masks, positions) is
    computed, so that code which looks at values goes on working.

    Args:
        dtype: of floating-point tensors, instead of their own.

    >>> layer = nn.Linear(2, 1 << 40, device="meta")
    >>> StandIn().of_module(layer)(torch.ones(3, 2)).shape
    torch.Size([3, 1099511627776])
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._mode, self._dtype = FakeTensorMode(allow_non_fake_inputs=True), dtype

    def of_module(self, module: _Module) -> _Module:
        """Return a copy with stand-ins for all parameters and buffers; the module stays as it is, tied weights tied."""
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(self._of(parameter), requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = self._of(buffer)
        trainer = getattr(module, "_trainer", None)
        if trainer is not None:  # of a LightningModule: a copy of it would take everything along
            memo[id(trainer)] = None
        return copy.deepcopy(module, memo)

    def of_batch(self, batch: Any) -> Any:
        """Return the batch with stand-ins for its floating-point tensors; integers stay, for models look at them."""
        return tree_map_only(Tensor, lambda value: self._of(value) if value.is_floating_point() else value, batch)

    def _of(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self._mode:
            if nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
                return torch.empty(0)
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
