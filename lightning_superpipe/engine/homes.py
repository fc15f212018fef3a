"""Homes: host memory of gradients. Their own, used again in every step, or lent where an update uses them up at once.

A unit that is updated in backward needs its gradients from their arrival until its update: a few slabs go round.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.layout import lay_out
from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.engine.slots import storage_use_count
from lightning_superpipe.tiers import Slab, Tier

__all__ = ["RING_SIZE", "Homes"]

RING_SIZE = 4
"""Units whose gradients lie in lent memory at once: one lands, one is used, two wait between them."""


class _Home(NamedTuple):
    """Memory of one gradient, and how many owners its storage has when nobody else holds it."""

    tensor: Tensor
    own_uses: int


@dataclass
class _Loan:
    """Memory lent to the gradients of one unit; ``used_up`` once an update that uses them is under way."""

    unit: int
    slab: Slab
    homes: dict[int, _Home]
    used_up: Event | None = None


class Homes:
    """Host memory of gradients, used again in every step.

    A user who still holds last step's gradient keeps it: the parameter then gets other memory
    (test_a_kept_gradient_does_not_change_later).
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._homes: dict[int, _Home] = {}
        self._group_of: dict[int, Sequence[nn.Parameter]] = {}
        self._slabs: dict[int, Slab] = {}
        self._loans: dict[int, _Loan] = {}
        self._free: list[Slab] = []
        self._lock = threading.Lock()
        self._own_references = _references(_Home(torch.empty(0), 0))

    def add_group(self, parameters: Sequence[nn.Parameter]) -> None:
        self._group_of.update((id(parameter), parameters) for parameter in parameters)

    def reserve(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make sure that there is room for the gradients of all these, should none be lent.

        Raises:
            BudgetError: the tier has no room for them.
        """
        trained = [each for each in parameters if each.requires_grad and id(each) not in self._homes]
        groups = {id(group[0]): group for each in trained for group in [self._group_of.get(id(each), [each])]}
        self._tier.reserve(lay_out([p for p in group if p.requires_grad])[1] for group in groups.values())

    def claim(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Memory for a parameter's gradient, shaped as the gradient; its contents are stale."""
        key, like = id(parameter), _in_dtype_of(parameter, gradient)
        if key in self._homes and self._fits(self._homes[key], like):
            return self._homes[key].tensor
        with raw_tensors():  # backward may run under somebody's modes
            return self._make(key, parameter, like)

    def _make(self, key: int, parameter: nn.Parameter, like: Tensor) -> Tensor:
        if key not in self._homes:
            self._allocate([p for p in self._group_of.get(key, [parameter]) if p.requires_grad] or [parameter])
        if not self._fits(self._homes[key], like):
            self._add(key, self._tier.allocate(like.nbytes).carve(0, like))
        return self._homes[key].tensor

    def _allocate(self, group: Sequence[nn.Parameter]) -> None:
        offsets, num_bytes = lay_out(group)
        slab = self._tier.allocate(num_bytes)
        for parameter, offset in zip(group, offsets, strict=True):
            self._slabs[id(parameter)] = slab
            self._add(id(parameter), slab.carve(offset, parameter.data))

    def _add(self, key: int, tensor: Tensor) -> None:
        self._homes[key] = _Home(tensor, storage_use_count(tensor))

    def _fits(self, home: _Home, gradient: Tensor) -> bool:
        same = home.tensor.size() == gradient.size() and home.tensor.dtype == gradient.dtype
        return same and home.tensor.stride() == gradient.stride() and self._is_free(home)

    # -- memory that is lent

    def lend(self, unit: int, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """Memory for a gradient that will be used up soon; None if the gradient is not shaped as its parameter.

        Where all of the ring is lent this waits for the oldest loan to be paid back.
        """
        if parameter.size() != gradient.size() or parameter.stride() != gradient.stride():
            return None
        loan = self._loans.get(unit)
        if loan is None:
            loan = self._open(unit, [p for p in self._group_of.get(id(parameter), ()) if p.requires_grad])
        home = loan.homes.get(id(parameter))
        return None if home is None or not self._fits(home, parameter) else home.tensor

    def has_loan(self, unit: int) -> bool:
        """Whether memory is lent to the gradients of a unit."""
        return unit in self._loans

    def _open(self, unit: int, group: Sequence[nn.Parameter]) -> _Loan:
        while (oldest := self._oldest()) is not None and oldest.used_up is not None:
            with contextlib.suppress(Exception):  # an update that failed tells those who wait for it
                oldest.used_up.synchronize()
            self._end(oldest)
        for parameter in group:
            self._homes.pop(id(parameter), None)
            if (slab := self._slabs.pop(id(parameter), None)) is not None:
                slab.close()
        offsets, num_bytes = lay_out(group)
        with raw_tensors():  # backward may run under somebody's modes
            slab = self._take(num_bytes)
            homes = {}
            for parameter, offset in zip(group, offsets, strict=True):
                tensor = slab.carve(offset, parameter.data)
                homes[id(parameter)] = _Home(tensor, storage_use_count(tensor))
        with self._lock:
            loan = self._loans[unit] = _Loan(unit, slab, homes)
        return loan

    def _oldest(self) -> _Loan | None:
        """The loan to wait for before there is another; None while the ring has room."""
        with self._lock:
            return next(iter(self._loans.values())) if len(self._loans) >= RING_SIZE else None

    def _end(self, loan: _Loan) -> None:
        with self._lock:
            self._loans.pop(loan.unit, None)

    def _take(self, num_bytes: int) -> Slab:
        with self._lock:
            fitting = [slab for slab in self._free if slab.num_bytes >= num_bytes]
            slab = min(fitting, key=lambda each: each.num_bytes) if fitting else None
            if slab is not None:
                self._free.remove(slab)
            elif self._free:  # too small: never more than the ring
                self._free.pop().close()
        return self._tier.allocate(num_bytes) if slab is None else slab

    def lent_until(self, unit: int, used_up: Event) -> bool:
        """The gradients of a unit will be used up with an event; return whether their memory is lent."""
        if (loan := self._loans.get(unit)) is not None:
            loan.used_up = used_up
        return loan is not None

    def take_back(self, unit: int, parameters: Iterable[nn.Parameter]) -> None:
        """The gradients of a unit are used up: ``p.grad`` is None, unless somebody else holds one of them."""
        loan = self._loans.get(unit)
        if loan is None:
            return
        for parameter in parameters:
            home = loan.homes.get(id(parameter))
            if home is not None and parameter.grad is home.tensor:
                parameter.grad = None
        if all(self._is_free(home) for home in loan.homes.values()):
            with self._lock:
                self._free.append(loan.slab)
        else:
            loan.slab.close()  # it is whoever's holds the gradient
        self._end(loan)

    def _is_free(self, home: _Home) -> bool:
        with unfenced():
            return _references(home) <= self._own_references and storage_use_count(home.tensor) <= home.own_uses

    def clear(self) -> None:
        self._homes.clear()
        self._group_of.clear()
        self._slabs.clear()
        self._loans.clear()
        self._free.clear()


def _in_dtype_of(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """A gradient, or a tensor without memory that is like it but for its dtype."""
    if gradient.dtype is parameter.dtype:
        return gradient
    return torch.empty_strided(gradient.size(), gradient.stride(), dtype=parameter.dtype, device="meta")


def _references(home: _Home) -> int:
    """Python references to a gradient's tensor, counted the same way wherever the home comes from."""
    return sys.getrefcount(home.tensor)
