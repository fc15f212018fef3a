"""From a model to units in registration order: the repeated blocks wherever they are, and what stands beside them.

1. A module that is opaque (`is_opaque`) is never split.
2. A *series* is a ModuleList, Sequential or ModuleDict with at least two parameter-owning children of one class. Each
   of its parameter-owning children is a block, one unit.
3. A block is opened only if a series inside it holds more than half of its bytes and each child of that series owns at
   least two matrices: the stages of a ResNet are opened, a T5 block is not.
4. From the root's children down: what holds a series is descended into (its own parameters become anchors); what holds
   none is one unit, split into its children while it is larger than the largest block and an eighth of the model,
   since every slot is as large as the largest unit.

Modules that the user chose, the outermost of them, are units; the same walk goes around them. A choice inside an
opaque module takes that module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_superpipe.config import UnitChoice
from lightning_superpipe.errors import PartitionError
from lightning_superpipe.partition.anchors import find_anchors, is_lazy, num_bytes, refuse_unsupported
from lightning_superpipe.partition.choice import can_be_unit, choose_modules, is_opaque, parametrizations, plain_class

__all__ = ["Partition", "UnitSpec", "partition", "unit_bytes"]

_SMALL_SHARE = 8  # at most 1/8 of the model: not worth splitting


@dataclass(frozen=True, eq=False)
class UnitSpec:
    """One unit: its name in the model and its module."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Partition:
    """A model taken apart: every parameter streams with exactly one unit or is an anchor.

    Attributes:
        units: in registration order, none inside another, each with at least one streamed parameter.
        anchors: ``id(parameter)`` -> why it has a permanent device copy instead.
        is_abstract: parameters on the meta device were taken for those that will take their place.
    """

    units: tuple[UnitSpec, ...]
    anchors: dict[int, str]
    is_abstract: bool = False


def partition(root: nn.Module, units: UnitChoice = None, *, is_abstract: bool = False) -> Partition:
    """Divide a model into units and anchors; the root itself is never a unit.

    Args:
        root: the model; its structure must not change while the partition is in use.
        units: class names, module names or patterns, or a callable ``(name, module) -> bool``; the outermost matches
            become units, everything beside them follows the automatic rule. None: the rule alone.
        is_abstract: take parameters on the meta device for those that will take their place, to look at a model that
            has no memory yet.

    Raises:
        PartitionError: no units found, or ``units`` names something that is not there.
        UnsupportedError: sparse, quantised or fp8 parameters.

    >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    >>> model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "blocks": blocks})
    >>> [unit.name for unit in partition(model).units]
    ['embed', 'blocks.0', 'blocks.1']
    >>> [unit.name for unit in partition(model, units="blocks").units]
    ['embed', 'blocks']
    """
    refuse_unsupported(root)
    tree = _Tree(choose_modules(root, units))
    names = {id(module): name for name, module in root.named_modules()}
    found = {id(module): module for module in _find(tree, root)}
    nested = {id(inner) for module in found.values() for inner in module.modules() if inner is not module}
    modules = [found[key] for key in names if key in found and key not in nested]
    anchors = find_anchors(root, modules, is_abstract=is_abstract)
    specs = tuple(UnitSpec(names[id(module)], module) for module in modules if _streams(module, anchors))
    if not specs:
        raise PartitionError(_no_units(root, anchors))
    return Partition(specs, anchors, is_abstract)


def unit_bytes(module: nn.Module, anchors: Container[int]) -> int:
    """Return the bytes that stream with a unit: those of its distinct parameters that are no anchors.

    >>> layer = nn.Linear(4, 2)
    >>> unit_bytes(layer, ()), unit_bytes(layer, {id(layer.bias): "shared by units"})
    (40, 32)
    """
    return sum(num_bytes(parameter) for parameter in module.parameters() if id(parameter) not in anchors)


class _Tree:
    """A module tree with its sizes and repetitions, each found once.

    Attributes:
        chosen: ids of the modules that match the user's choice.
    """

    def __init__(self, chosen: frozenset[int]) -> None:
        self.chosen = chosen
        self._bytes_in: dict[int, int] = {}
        self._has_series: dict[tuple[int, bool], bool] = {}

    def bytes_in(self, module: nn.Module) -> int:
        """Bytes of the distinct parameters inside."""
        if id(module) not in self._bytes_in:
            self._bytes_in[id(module)] = sum(map(num_bytes, module.parameters()))
        return self._bytes_in[id(module)]

    def children(self, module: nn.Module) -> list[nn.Module]:
        """Distinct children that own parameters; what computes a parametrised tensor is part of its module."""
        hidden = parametrizations(module)
        return [child for child in module.children() if child is not hidden and self.bytes_in(child)]

    def holds_chosen(self, module: nn.Module) -> bool:
        return bool(self.chosen) and any(id(inner) in self.chosen for inner in module.modules())

    def is_series(self, module: nn.Module, of_blocks: bool) -> bool:
        """Tell whether the module is a series; ``of_blocks`` asks for at least two matrices in each child."""
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return False
        children = self.children(module)
        classes = Counter(plain_class(child) for child in children)
        repeated = max(classes.values(), default=0) > 1
        return repeated and (not of_blocks or all(_num_matrices(child) > 1 for child in children))

    def has_series(self, module: nn.Module, of_blocks: bool) -> bool:
        """Tell whether the module is a series or one can be reached inside it without splitting something opaque."""
        key = (id(module), of_blocks)
        if key not in self._has_series:
            self._has_series[key] = not is_opaque(module) and (
                self.is_series(module, of_blocks)
                or any(self.has_series(child, of_blocks) for child in self.children(module))
            )
        return self._has_series[key]

    def opens(self, block: nn.Module) -> bool:
        """Tell whether a series of blocks holds more than half of the block's bytes."""
        return self._holds_series_over(block, self.bytes_in(block) // 2)

    def _holds_series_over(self, module: nn.Module, limit: int) -> bool:
        if is_opaque(module) or self.bytes_in(module) <= limit:
            return False
        return self.is_series(module, True) or any(
            self._holds_series_over(child, limit) for child in self.children(module)
        )


class _Found(NamedTuple):
    """A subtree that the walk stopped at; one without blocks may still be too large for a unit."""

    module: nn.Module
    is_block: bool


def _find(tree: _Tree, root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that the rule makes units; some may lie inside others where modules are shared."""
    if _is_indivisible(root):
        return
    found = list(_descend(tree, root, of_blocks=False))
    blocks = [tree.bytes_in(module) for module, is_block in found if is_block]
    cap = max([*blocks, tree.bytes_in(root) // _SMALL_SHARE])
    for module, is_block in found:
        yield from filter(can_be_unit, [module] if is_block else _split(tree, module, cap))


def _is_indivisible(root: nn.Module) -> bool:
    """Tell whether nothing inside the root may be a unit; a parametrised tensor of its own does not matter."""
    return is_opaque(root) and parametrizations(root) is None


def _descend(tree: _Tree, module: nn.Module, of_blocks: bool) -> Iterator[_Found]:
    """Visit what is inside a module that is no unit; in a series each child is a block, or is opened."""
    in_series = tree.is_series(module, of_blocks) and not tree.holds_chosen(module)
    for child in tree.children(module):
        if not in_series:
            yield from _walk(tree, child, of_blocks)
        elif tree.opens(child):
            yield from _descend(tree, child, of_blocks=True)
        else:
            yield _Found(child, is_block=True)


def _walk(tree: _Tree, module: nn.Module, of_blocks: bool) -> Iterator[_Found]:
    """Descend to the series; inside an opened block only series of blocks count."""
    if id(module) in tree.chosen or is_opaque(module):
        yield _Found(module, is_block=True)
    elif tree.holds_chosen(module) or tree.has_series(module, of_blocks):
        yield from _descend(tree, module, of_blocks)
    else:
        yield _Found(module, is_block=False)


def _split(tree: _Tree, module: nn.Module, cap: int) -> Iterator[nn.Module]:
    """Yield the module, or its children if it is larger than the cap and can be split."""
    children = tree.children(module)
    size = tree.bytes_in(module)
    splits = len(children) > 1 or (len(children) == 1 and tree.bytes_in(children[0]) == size)
    if size > cap and splits and not is_opaque(module):
        for child in children:
            yield from _split(tree, child, cap)
    else:
        yield module


def _num_matrices(module: nn.Module) -> int:
    return sum(not is_lazy(parameter) and parameter.ndim > 1 for parameter in module.parameters())


def _streams(module: nn.Module, anchors: Container[int]) -> bool:
    return any(id(parameter) not in anchors for parameter in module.parameters())


def _no_units(root: nn.Module, anchors: dict[int, str]) -> str:
    """Return the message for a model in which nothing can stream."""
    title = plain_class(root).__name__
    if not anchors:
        return f"no units found: {title} owns no parameters, so there is nothing to stream. Use another strategy."
    counts = Counter(anchors.values()).most_common()
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    if _is_indivisible(root):
        way_out = f"{title} cannot be split: make it a child of another module, or compile the blocks inside it instead"
    elif counts[0][0] == "lazy":
        way_out = "Run one batch through the model first, so that its lazy parameters get their sizes"
    elif counts[0][0] == "meta":
        way_out = "Give the model its memory first: model.to_empty(device='cpu'), then its weights"
    else:
        way_out = "Put the layers into child modules (self.net = ...): the model itself is never a unit"
    return f"no units found in {title}: none of its {len(anchors)} parameters can stream ({reasons}). {way_out}."
