"""Modules made on the meta device get memory on the host, and their first values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.errors import UnsupportedError

__all__ = ["materialize", "refuse_meta"]


class _Owner(NamedTuple):
    """A module with meta tensors of its own."""

    name: str
    module: nn.Module


def materialize(root: nn.Module) -> None:
    """Give every meta parameter and buffer memory on the host and let its module fill it; does nothing without any.

    A transformers model initialises itself; of other modules ``reset_parameters()`` is called, in the order in which
    ``root.modules()`` has them, which draws the same random numbers as constructing them does. Shared parameters stay
    shared. Checkpoints are loaded after that.

    Raises:
        UnsupportedError: a module has meta tensors and no ``reset_parameters()``.
    """
    owners = list(_owners(root))
    if not owners:
        return
    whole = [model for model in dict.fromkeys(_outermost(root)) if any(_owners(model))]
    covered = {id(inner) for model in whole for inner in model.modules()}
    resets = {id(owner.module): _reset_of(owner) for owner in owners if id(owner.module) not in covered}
    twins: dict[int, Tensor] = {}
    for owner in owners:
        _give_memory(owner.module, twins)
        if id(owner.module) in resets:
            resets[id(owner.module)]()
    for model in whole:
        model.init_weights()  # type: ignore[operator]


def refuse_meta(root: nn.Module) -> None:
    """Refuse a model that an optimizer may refer to already: new parameters would be unknown to it.

    Raises:
        UnsupportedError: a parameter or buffer is on the meta device.
    """
    for owner in _owners(root):
        raise UnsupportedError(
            f"{owner.name!r} ({type(owner.module).__name__}) is on the meta device: it has no values to stream. Give "
            "it memory before its optimizer is made, by from_pretrained(...), or model.to_empty(device='cpu') and its "
            "initialisation. (Trainer does so by itself for what configure_model makes, Fabric for a model that is set "
            "up before its optimizer.)"
        )


def _owners(root: nn.Module) -> Iterator[_Owner]:
    for name, module in root.named_modules():
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            yield _Owner(name or type(module).__name__, module)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Models that initialise themselves, those inside another left out."""
    if _initialises_itself(module):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _initialises_itself(module: nn.Module) -> bool:
    """Whether this is a transformers model, which knows how to fill all that is inside it."""
    return all(callable(getattr(module, name, None)) for name in ("init_weights", "_init_weights", "tie_weights"))


def _reset_of(owner: _Owner) -> Callable[[], Any]:
    for name in ("reset_parameters", "_reset_parameters"):  # the latter is what torch's attention calls it
        if callable(reset := getattr(owner.module, name, None)):
            return reset  # type: ignore[no-any-return]
    raise UnsupportedError(
        f"{owner.name!r} ({type(owner.module).__name__}) was made on the meta device and has no reset_parameters(), so "
        "nobody knows its first values. Give the class that method, or make the module outside the meta device."
    )


def _give_memory(module: nn.Module, twins: dict[int, Tensor]) -> None:
    """Put host tensors in the place of meta tensors; those that modules share stay shared."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in twins:
                fresh = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                fresh.__dict__.update(parameter.__dict__)
                twins[id(parameter)] = fresh
            module._parameters[name] = twins[id(parameter)]  # type: ignore[assignment]
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = twins.setdefault(id(buffer), torch.empty_like(buffer, device="cpu"))
