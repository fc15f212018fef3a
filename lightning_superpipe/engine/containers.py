"""Nested arguments and results taken apart into leaves and put together again: pytrees and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Structure", "is_immutable", "take_apart"]

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


class _Fields(NamedTuple):
    """A dataclass instance that pytree does not know: its class, and the structure of its fields."""

    kind: type
    names: tuple[str, ...]
    inner: Structure


class Structure(NamedTuple):
    """What is left of a nested value without its leaves; holds no tensor.

    Attributes:
        nested: per leaf of ``spec``, the dataclass that stands there; None for an ordinary leaf.
        num_leaves: of all levels together.
    """

    spec: TreeSpec
    nested: tuple[_Fields | None, ...]
    num_leaves: int

    def build(self, leaves: Iterable[Any]) -> Any:
        """Return new containers of the same shape and classes around other leaves.

        >>> leaves, structure = take_apart({"x": 1, "y": (2, [3])})
        >>> structure.build(leaf * 10 for leaf in leaves)
        {'x': 10, 'y': (20, [30])}
        """
        remaining = iter(leaves)
        outer = [next(remaining) if fields is None else _made(fields, remaining) for fields in self.nested]
        return tree_unflatten(outer, self.spec)


def _made(fields: _Fields, leaves: Iterable[Any]) -> Any:
    remaining = iter(leaves)
    values = fields.inner.build([next(remaining) for _ in range(fields.inner.num_leaves)])
    made: Any = object.__new__(fields.kind)
    for name, value in zip(fields.names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the dataclass is frozen
    return made


def take_apart(value: Any) -> tuple[list[Any], Structure]:
    """Return the leaves of a nested value and its structure.

    >>> take_apart([1, {"a": None}])[0]
    [1, None]
    """
    outer, spec = tree_flatten(value)
    leaves: list[Any] = []
    nested: list[_Fields | None] = []
    for leaf in outer:
        if _is_plain_dataclass(leaf):
            names = tuple(field.name for field in dataclasses.fields(leaf))
            inner_leaves, inner = take_apart([getattr(leaf, name) for name in names])
            leaves += inner_leaves
            nested.append(_Fields(type(leaf), names, inner))
        else:
            leaves.append(leaf)
            nested.append(None)
    return leaves, Structure(spec, tuple(nested), len(leaves))


def _is_plain_dataclass(value: Any) -> bool:
    """Whether fields are all that an instance has."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    names = {field.name for field in dataclasses.fields(value)}
    return set(getattr(value, "__dict__", names)) == names


def is_immutable(leaf: Any) -> bool:
    """Whether nobody can change a value; tensors are looked at elsewhere."""
    return isinstance(leaf, _IMMUTABLE)
