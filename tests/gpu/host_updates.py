"""The ordinary run with its updates on the host, where a streamed one makes them.

A GPU's kernels fuse multiplications and additions otherwise than a CPU's, so the same optimizer gives other last bits
there. The promise is equality with the same implementation of the optimizer: the reference makes its steps on copies at
home. Everything else of it stays on its device, untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

__all__ = ["updates_at_home"]

Pairs = list[tuple[nn.Parameter, nn.Parameter]]


@contextlib.contextmanager
def updates_at_home() -> Iterator[None]:
    """Let every optimizer step inside work on host copies of parameters, gradients and states, and bring them back.

    A closure is called once, before the step; optimizers that call it again (LBFGS) cannot be served.
    """
    away: dict[int, Pairs] = {}

    def go_home(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter.device.type == "cpu" for parameter in parameters):
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        loss = _called(closure)
        away[id(optimizer)] = pairs = [(parameter, _at_home(parameter)) for parameter in parameters]
        _swap(optimizer, pairs)
        return (optimizer,), {} if closure is None else {"closure": lambda: loss}

    def come_back(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        pairs = away.pop(id(optimizer), None)
        if pairs is None:
            return
        _swap(optimizer, [(home, parameter) for parameter, home in pairs])
        with torch.no_grad():
            for parameter, home in pairs:
                parameter.copy_(home)

    hooks = [register_optimizer_step_pre_hook(go_home), register_optimizer_step_post_hook(come_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _called(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _at_home(parameter: nn.Parameter) -> nn.Parameter:
    home = nn.Parameter(parameter.detach().cpu(), parameter.requires_grad)
    home.grad = None if parameter.grad is None else parameter.grad.detach().cpu()
    return home


def _swap(optimizer: Optimizer, pairs: Pairs) -> None:
    """Put the second of each pair where the optimizer has the first; states stay on the host."""
    other = dict(pairs)
    for group in optimizer.param_groups:
        group["params"] = [other[parameter] for parameter in group["params"]]
    for before, after in pairs:
        if before in optimizer.state:
            optimizer.state[after] = tree_map_only(Tensor, Tensor.cpu, optimizer.state.pop(before))
