"""Recomputation: a unit's call keeps its inputs only, and runs again when backward needs what it saved.

This is :func:`torch.utils.checkpoint.checkpoint`, non-reentrant, around each call of a unit. Weights stay tokens: our
hooks are the innermost. What autograd saves is held until the call has ended and has shown that it can be repeated; if
it cannot, it stays, and the call is one that keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_superpipe.engine.containers import take_apart
from lightning_superpipe.engine.side_effects import Traces

__all__ = ["Repeatable"]

Call = Callable[..., Any]


class _Held:
    """A saved tensor twice: itself, until it is let go, and what checkpointing makes of it."""

    __slots__ = ("below", "tensor")

    def __init__(self, tensor: Tensor, below: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.below = below


class _Trial:
    """The pair of hooks between ours and checkpointing's while a call runs for the first time."""

    def __init__(self) -> None:
        below = torch._C._autograd._top_saved_tensors_default_hooks(True)
        assert below is not None, "checkpointing has its hooks around the call"
        self._pack_below, self._unpack_below = below
        self._held: list[_Held] = []

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach(), self._pack_below(tensor))
        self._held.append(held)
        return held

    def unpack(self, held: _Held) -> Tensor:
        tensor: Tensor = self._unpack_below(held.below) if held.tensor is None else held.tensor
        return tensor

    def end(self, *, keeps: bool) -> None:
        """The call is over: let all tensors go, to be computed again, or keep them."""
        for held in [] if keeps else self._held:
            held.tensor = None
        self._held.clear()


class Repeatable:
    """One call of a unit, run now and perhaps again in backward.

    Args:
        device: its random state and autocast are as before when the call is repeated.
        modules: that run.
        first: runs the call in forward.
        found: asked after it, says what it did to its weights that forbids to repeat it.
        again: runs it in backward, after having made sure that it may.

    Attributes:
        reason: why the call was not one to repeat; None if it was.
    """

    def __init__(
        self,
        device: torch.device,
        modules: list[nn.Module],
        first: Call,
        found: Callable[[], str | None],
        again: Call,
    ) -> None:
        self._device, self._modules, self._first, self._found, self._again = device, modules, first, found, again
        self.reason: str | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call and return its output."""
        leaves, structure = take_apart((args, kwargs))
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[index] for index in positions]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        first = self._watched(args, kwargs, tensors)
        again = self._again
        to_run = [first]
        del first, leaves  # the graph holds what the function below names

        def call(_: Tensor, *inputs: Tensor) -> Any:
            if to_run:
                return to_run.pop()()
            values = list(others)
            for index, value in zip(positions, inputs, strict=True):
                values[index] = value
            args, kwargs = structure.build(values)  # fresh containers: callees change the lists they are given
            return again(*args, **kwargs)

        # Checkpointing looks for the device among positional tensors, to restore its generator and its autocast.
        return checkpoint(call, torch.empty(0, device=self._device), *tensors, use_reentrant=False)

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            trial, traces = _Trial(), Traces(self._modules, tensors)
            with saved_tensors_hooks(trial.pack, trial.unpack):
                output = self._first(*args, **kwargs)
            self.reason = traces.found() or self._found()
            trial.end(keeps=self.reason is not None)
            return output

        return run
