"""What the user's ``units=`` means in a model: a class name, a module's name, a pattern of names, or a callable."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from lightning_superpipe.config import UnitChoice
from lightning_superpipe.errors import PartitionError
from lightning_superpipe.partition.anchors import is_lazy

__all__ = ["can_be_unit", "choose_modules", "is_opaque", "parametrizations", "plain_class"]

# They read their children's weights directly, so a child would never be called and never load.
_READS_CHILDREN = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_MAX_LISTED = 8  # names in a message


def is_opaque(module: nn.Module) -> bool:
    """Tell whether the module is never split: it reads its children's weights, or is compiled, scripted, parametrised.

    >>> is_opaque(nn.LSTM(2, 2)), is_opaque(nn.Sequential(nn.Linear(2, 2)))
    (True, False)
    """
    return (
        isinstance(module, (*_READS_CHILDREN, torch.jit.ScriptModule))
        or "_orig_mod" in module._modules  # torch.compile(module); torch._dynamo is slow to import
        or parametrizations(module) is not None
    )


def parametrizations(module: nn.Module) -> nn.ModuleDict | None:
    """Return what computes the module's own parametrised tensors, or None.

    Unlike torch's `is_parametrized` this does not read an attribute: wrappers answer with that of the wrapped module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    own = module._modules.get("parametrizations")
    return own if isinstance(own, nn.ModuleDict) and len(own) > 0 else None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class; parametrising makes a class of its own for each module, seen through here."""
    return type(module) if parametrizations(module) is None else type(module).__bases__[0]


def can_be_unit(module: nn.Module) -> bool:
    """Tell whether tensors can be swapped in: the module owns parameters, is not scripted, and is not a mere list."""
    return not isinstance(module, (torch.jit.ScriptModule, nn.ParameterList, nn.ParameterDict)) and any(
        not is_lazy(parameter) for parameter in module.parameters()
    )


def choose_modules(root: nn.Module, choice: UnitChoice) -> frozenset[int]:
    """Return the ids of the modules that match, none if ``choice`` is None; one may lie inside another.

    Raises:
        PartitionError: an entry matches nothing that could be a unit, or is neither text nor callable.
    """
    if choice is None:
        return frozenset()
    inner = [(name, module) for name, module in root.named_modules(remove_duplicate=False) if module is not root]
    matched: set[int] = set()
    for wish in _wishes(choice):
        matches = [module for name, module in inner if wish.accepts(name, module)]
        usable = {id(module) for module in matches if can_be_unit(module)}
        if not usable:
            raise PartitionError(_why_nothing(wish, root, inner, len(matches)))
        matched |= usable
    return frozenset(matched)


class _Wish(NamedTuple):
    """One entry of ``units=``: how messages call it, its text (None: a callable), and the test."""

    label: str
    text: str | None
    accepts: Callable[[str, nn.Module], bool]


def _wishes(choice: object) -> list[_Wish]:
    """Take the user's choice apart and check its types."""
    if isinstance(choice, str):
        return [_wish(choice)]
    if callable(choice) and not isinstance(choice, type):
        return [_Wish(f"{getattr(choice, '__name__', type(choice).__name__)}(name, module)", None, choice)]
    if isinstance(choice, Sequence) and choice and all(isinstance(entry, str) for entry in choice):
        return [_wish(entry) for entry in choice]
    hint = ""
    if isinstance(choice, type) and issubclass(choice, nn.Module):
        hint = f" Did you mean units={choice.__name__!r}?"
    raise PartitionError(
        f"units={choice!r}: allowed are a class name, a module's name, a pattern such as 'net.blocks.*', a list of at "
        f"least one of these, a callable (name, module) -> bool, and None, which finds the units.{hint}"
    )


def _wish(text: str) -> _Wish:
    def accepts(name: str, module: nn.Module) -> bool:
        return text in (name, plain_class(module).__name__) or fnmatchcase(name, text)

    return _Wish(repr(text), text, accepts)


def _why_nothing(wish: _Wish, root: nn.Module, inner: Sequence[tuple[str, nn.Module]], num_matches: int) -> str:
    """Return the message for a wish that gives no unit."""
    start = f"units={wish.label} "
    if num_matches:
        return start + (
            f"matches {num_matches} module(s), but none that can be a unit: they own no parameters yet, or are "
            "ScriptModules or ParameterLists. Name modules that own weights and are called."
        )
    if wish.text == plain_class(root).__name__:
        return start + "is the model itself, which is never a unit. Name modules inside it."
    start += f"matches none of the {len(inner)} modules inside {plain_class(root).__name__}"
    able = [(name, plain_class(module).__name__) for name, module in inner if can_be_unit(module)]
    known = list(dict.fromkeys([kind for _, kind in able] + [name for name, _ in able]))
    near = difflib.get_close_matches(wish.text, known, n=3) if wish.text else []
    if near:
        return f"{start}: did you mean {' or '.join(map(repr, near))}?"
    rest = f" and {len(known) - _MAX_LISTED} more" if len(known) > _MAX_LISTED else ""
    return f"{start}. Classes and names here: {', '.join(known[:_MAX_LISTED])}{rest}."
