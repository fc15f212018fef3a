"""Micro-batches: a unit's batch in parts, one after the other while the unit is resident.

Every part is a call of its own that is recomputed in backward, so that the activations of one part only are alive, and
the unit's weights and gradients cross the link once for all parts. Sums over the batch are taken part by part: equal to
the whole batch up to the order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.containers import Structure, take_apart
from lightning_superpipe.errors import UnsupportedError

__all__ = ["MicroBatches", "SplitError", "batched", "why_not_split"]

Call = Callable[..., Any]
_ADVICE = "Use micro_batches=1, or activations={{{name!r}: 'keep', ...}} to give this unit its whole batch."
# Rounding moves a value by about one unit in the last place; a coupled sample moves it by the size of the value.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SplitError(UnsupportedError):
    """The batch of a unit cannot be split."""


def why_not_split(modules: Sequence[nn.Module]) -> str | None:
    """Say why a batch cannot be split inside these modules, as far as their classes tell."""
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return f"{type(module).__name__} couples the samples of a batch"
        if getattr(module, "batch_first", True) is False:
            return f"{type(module).__name__} has its batch in dimension 1 (batch_first=False)"
    return None


def batched(leaves: Sequence[Any]) -> Tensor | None:
    """Return the argument whose first dimension is the batch's: the first of floating point, or the first tensor."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0] if tensors else None)


class _Parts(NamedTuple):
    """Arguments in parts: the size of each, and per leaf whether it is split or goes to every part whole."""

    sizes: tuple[int, ...]
    is_split: tuple[bool, ...]


class MicroBatches:
    """Splits the calls of one unit.

    Args:
        name: of the unit, for errors.
        num_parts: of each batch; a batch that it does not divide gets parts that differ by one sample, and one with
            fewer samples than parts gets a part for each.
    """

    def __init__(self, name: str, num_parts: int) -> None:
        self._name, self._num_parts = name, num_parts
        self._rehearsed: set[tuple[bool, ...]] = set()

    def run(
        self,
        modules: list[nn.Module],
        call: Call,
        rehearse: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run ``call`` once for each part and return the joined output.

        Before a way of splitting is used for the first time, half a part is tried against a part, without gradients and
        dropout: more than a part of the batch is never computed at once.

        Args:
            modules: of the unit.
            rehearse: the same as ``call``, without anything to remember.

        Raises:
            SplitError: the batch cannot be split here; the message names the unit.
        """
        if (reason := why_not_split(modules)) is not None:
            raise self.refusal(reason)
        leaves, structure = take_apart((args, kwargs))
        parts = self._parts(leaves)
        if len(parts.sizes) < 2:
            return call(*args, **kwargs)
        if parts.is_split not in self._rehearsed:
            self._compare(modules, rehearse, leaves, structure, parts)
            self._rehearsed.add(parts.is_split)
        outputs = []
        for part in self._split(leaves, parts):
            args, kwargs = structure.build(part)
            outputs.append(call(*args, **kwargs))
        return self._join(outputs, parts.sizes, leaves)

    def _parts(self, leaves: list[Any]) -> _Parts:
        if (first := batched(leaves)) is None:
            raise self.refusal("no argument is a tensor with a batch dimension")
        size = len(first)
        num_parts = max(1, min(self._num_parts, size))
        sizes = tuple(size // num_parts + (index < size % num_parts) for index in range(num_parts))
        is_split = tuple(isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size for leaf in leaves)
        return _Parts(sizes, is_split)

    def _split(self, leaves: list[Any], parts: _Parts) -> Iterator[list[Any]]:
        pieces = [
            leaf.split(parts.sizes) if is_split else None for leaf, is_split in zip(leaves, parts.is_split, strict=True)
        ]
        for index in range(len(parts.sizes)):
            yield [leaf if cut is None else cut[index] for leaf, cut in zip(leaves, pieces, strict=True)]

    def _join(self, outputs: list[Any], sizes: tuple[int, ...], given: list[Any]) -> Any:
        taken = [take_apart(output) for output in outputs]
        structure: Structure = taken[0][1]
        if any(other.num_leaves != structure.num_leaves for _, other in taken):
            raise self.refusal("its outputs for two parts of a batch have different structures")
        columns = zip(*(leaves for leaves, _ in taken), strict=True)
        return structure.build([self._joined(column, sizes, given) for column in columns])

    def _joined(self, column: tuple[Any, ...], sizes: tuple[int, ...], given: list[Any]) -> Any:
        first = column[0]
        if all(value is first for value in column):
            return first  # a constant, or an argument that every part was given whole
        if not all(isinstance(value, Tensor) for value in column):
            if any(isinstance(value, Tensor) for value in column) or any(value != first for value in column):
                raise self.refusal(f"it returns values that differ by part: {str(first)[:40]}")
            return first
        if any(value.dim() == 0 or len(value) != size for value, size in zip(column, sizes, strict=True)):
            raise self.refusal(f"it returns a tensor of shape {tuple(first.shape)} for {sizes[0]} samples")
        return torch.cat(column)

    def _compare(
        self, modules: list[nn.Module], call: Call, leaves: list[Any], structure: Structure, parts: _Parts
    ) -> None:
        """Try the first part, or two samples if it is one, against half of it.

        Raises:
            SplitError: the samples of that half come out otherwise when the others are missing.
        """
        size = max(2, parts.sizes[0])
        results = []
        with _rehearsal(modules, leaves):
            for num_samples in (size, size // 2):
                cut = [
                    leaf[:num_samples] if split else leaf for leaf, split in zip(leaves, parts.is_split, strict=True)
                ]
                copies = [value.clone() if isinstance(value, Tensor) else value for value in cut]
                args, kwargs = structure.build(copies)  # what a call changes in place is a copy
                try:
                    results.append(take_apart(call(*args, **kwargs))[0])
                except RuntimeError as error:
                    raise self.refusal(f"a call with {num_samples} of its samples raised: {error}") from error
        for whole, part in zip(*results, strict=False):
            if isinstance(whole, Tensor) and whole.dim() and len(whole) == size:
                self._check(whole[: size // 2], part)

    def _check(self, expected: Tensor, part: Tensor) -> None:
        if expected.shape != part.shape:
            raise self.refusal(f"a part of a batch gives {tuple(part.shape)} in place of {tuple(expected.shape)}")
        if not expected.numel():
            return
        if not expected.is_floating_point():
            difference, allowed = float((expected != part).any()), 0.0
        else:
            difference = (expected.double() - part.double()).abs().nan_to_num(0.0).max().item()
            size = expected.double().abs().nan_to_num(0.0).max().item()
            allowed = _SAME.get(expected.dtype, 1e-1) * max(size, 1e-30)
        if difference > allowed:
            raise self.refusal(
                f"its output for a sample depends on the other samples (by {difference:.1e}; {allowed:.1e} is rounding)"
            )

    def refusal(self, reason: str) -> SplitError:
        """The error that says why the unit's batch cannot be split."""
        return SplitError(
            f"micro_batches={self._num_parts} cannot split the batch of unit {self._name!r}: {reason}. "
            + _ADVICE.format(name=self._name)
        )


@contextlib.contextmanager
def _rehearsal(modules: list[nn.Module], leaves: list[Any]) -> Iterator[None]:
    """Scope in which calls leave no graph, no draw, no cast in autocast's cache, and nothing is dropped out."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cpu"
    buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    training, caches = [module.training for module in modules], torch.is_autocast_cache_enabled()
    indices = [device.index or 0 for device in devices]
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(indices, device_type=kind if devices else "cuda"):
            for module in modules:
                module.training = False
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        torch.set_autocast_cache_enabled(caches)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)
