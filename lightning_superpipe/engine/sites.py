"""Where a unit's parameters sit in its modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Site", "derived_attributes", "signature"]


class Site(NamedTuple):
    """A place in the model where a parameter is registered: ``module._parameters[name]``."""

    module: nn.Module
    name: str
    parameter: nn.Parameter

    def holds(self, parameter: nn.Parameter) -> bool:
        return self.module._parameters.get(self.name) is parameter

    def put(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


def signature(sites: Sequence[Site]) -> list[tuple[int, str, int]]:
    """Equal ones mean that the same parameters sit in the same places."""
    return [(id(site.module), site.name, id(site.parameter)) for site in sites]


def derived_attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Plain tensors that a pre-forward hook makes of parameters (pruning, weight norm of the older kind).

    They belong beside the parameters: pruning reads them between steps, together with masks on the host.
    """
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            name = getattr(hook, "_tensor_name", getattr(hook, "name", None))
            if isinstance(name, str) and isinstance(inner.__dict__.get(name), Tensor):
                yield inner, name
