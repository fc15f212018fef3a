"""What those who measure are told by an engine: where compute ends, and what autograd holds for each unit."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lightning_superpipe.engine.backend import storage_address
from lightning_superpipe.engine.micro_batches import batched
from lightning_superpipe.engine.offload import MIN_BYTES
from lightning_superpipe.engine.slots import SlotPool
from lightning_superpipe.engine.unit import Unit

__all__ = ["Census", "Held", "Probes"]


class Held(NamedTuple):
    """Bytes that one unit's calls hold until their backward.

    Attributes:
        activations: when they are kept.
        inputs: when they are recomputed.
        travels: of ``activations``, what offloading moves.
    """

    activations: int = 0
    inputs: int = 0
    travels: int = 0


class Census:
    """Counts the bytes that autograd holds from a unit's forward to its backward, under each policy, whichever is on.

    Each storage counts once.

    A storage that a unit is given as input is held by it under every policy, and by nobody earlier: the unit before
    may have saved it as its output, but this one is the later of the two in forward. An input that several units share
    (a mask, an encoder's output) is the first one's.

    Args:
        slots, staying: what lies in slots, or at the addresses of anchors and buffers, counts for nobody.
        counts: whether a tensor was made in this step; None counts all.
        on_travelling: told each tensor that would travel.
    """

    def __init__(
        self,
        slots: SlotPool,
        staying: Container[int],
        counts: Callable[[Tensor], bool] | None = None,
        on_travelling: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._slots, self._staying, self._counts, self._on_travelling = slots, staying, counts, on_travelling
        self._given: dict[int, int] = {}
        self._saved: dict[int, int] = {}
        self._units_that_save: set[int] = set()
        # A weak reference keeps the address of a dead storage from being used again.
        self._refs: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}

    def give(self, unit: int, values: Any) -> None:
        """Note what a unit's call is given."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and (key := self._key(leaf)) is not None:
                self._given.setdefault(key, unit)

    def save(self, unit: int, tensor: Tensor) -> None:
        """Note that autograd saves a tensor in a unit's call."""
        self._units_that_save.add(unit)
        if (key := self._key(tensor)) is not None:
            if key not in self._saved and self._on_travelling is not None and self._sizes[key] >= MIN_BYTES:
                self._on_travelling(tensor)
            self._saved.setdefault(key, unit)

    def _key(self, tensor: Tensor) -> int | None:
        address = storage_address(tensor)
        if address is None or isinstance(tensor, torch.nn.Parameter) or tensor.device.type != self._slots.device.type:
            return None
        if address in self._staying or self._slots.of(tensor) is not None:
            return None
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._refs:
            if self._counts is not None and not self._counts(tensor):
                return None
            self._refs[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._sizes[key] = storage.nbytes()
        return key

    def held(self, num_units: int) -> list[Held]:
        """Return what each unit holds."""
        counts = [[0, 0, 0] for _ in range(num_units)]
        for key, unit in self._given.items():
            if unit in self._units_that_save:  # without a graph nothing is held
                counts[unit][1] += self._sizes[key]
        for key, saver in self._saved.items():
            unit, size = self._given.get(key, saver), self._sizes[key]
            counts[unit][0] += size
            counts[unit][2] += size if size >= MIN_BYTES else 0
        return [Held(*count) for count in counts]


class Probes:
    """Where those who measure listen.

    Attributes:
        on_boundary: called with ``"F"`` or ``"B"`` and a unit's index after its compute, with ``"turn"`` when backward
            begins and ``"home"`` when its gradients are home.
        census: counts what autograd saves in units; None does not.
        given_bytes: of the tensors that units were given in forward since it was 0; None counts none.
        given_rows: of those, by unit: the samples in the last batch, as far as one tensor tells.
        last_use: what the engine was asked for last: ``"F"`` or ``"B"``, and the unit.
    """

    def __init__(self) -> None:
        self.on_boundary: Callable[[str, int], None] | None = None
        self.last_use: tuple[str, Unit] | None = None
        self.census: Census | None = None
        self.given_bytes: int | None = None
        self.given_rows: dict[int, int] = {}

    def given(self, unit: int, values: Any) -> None:
        """A unit is called in forward."""
        if self.given_bytes is not None:
            tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
            if (first := batched(tensors)) is not None:
                self.given_rows[unit] = len(first)
            self.given_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.census is not None and torch.is_grad_enabled():
            self.census.give(unit, values)

    def boundary(self, name: str, index: int = -1) -> None:
        """Some compute is over."""
        if self.on_boundary is not None:
            self.on_boundary(name, index)

    def end_backward_of(self, unit: Unit | None) -> None:
        """A unit's backward is over; None: no unit's has begun yet."""
        if unit is None:
            self.boundary("turn")
        else:
            self.boundary("B", unit.index)
