"""Parts of a step: what is updated of one unit, and of a step that has been announced."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.engine.arrivals import Scaling, take
from lightning_superpipe.engine.catalog import Catalog
from lightning_superpipe.engine.pending import Pending, unfenced
from lightning_superpipe.optimizer.separable import Member, options

__all__ = ["Announced", "Part", "by_unit"]

Narrow = Callable[[Optimizer, Sequence[dict[str, Any]], Sequence[Member]], Callable[[], None]]


@dataclass
class Announced:
    """A step that will follow the backward pass to come, and what has been updated of it.

    Attributes:
        ranks: place of each unit in the order in which the next forward is expected to need them.
        lends: gradients of units that have been updated may be gone.
    """

    optimizer: Optimizer
    members: dict[int, list[Member]]
    ranks: dict[int, int]
    lends: bool = False
    home: dict[int, Counter[int]] = field(default_factory=dict)
    updated: dict[int, Part] = field(default_factory=dict)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Options of all groups when the first gradients are home: until then a training step may change them."""
        return options(self.optimizer)


class Part:
    """The part of a step that belongs to one unit; its gradients may still be on their way when it is made.

    Args:
        narrow: returns the step for some parameters and their gradients of then, see :func:`narrowed`; may be changed
            until they are taken.
        also: parameters that are written with them, unchanged.
    """

    def __init__(
        self,
        narrow: Narrow,
        optimizer: Optimizer,
        groups: list[dict[str, Any]],
        some: Sequence[Member],
        *,
        also: Sequence[nn.Parameter] = (),
    ) -> None:
        self.narrow, self.optimizer, self._groups, self.members = narrow, optimizer, groups, some
        self._also = also
        self._step: Callable[[], None] | None = None
        self._scalings: list[Scaling] = []
        self._taken: list[tuple[weakref.ref[Tensor], int]] = []
        self._lock = threading.Lock()

    def tensors(self) -> list[Tensor]:
        """All that the part reads or writes, but for the gradients."""
        parameters = [*(member.parameter for member in self.members), *self._also]
        states = (self.optimizer.state.get(parameter, {}).values() for parameter in parameters)
        values = [value for state in states for value in state if isinstance(value, Tensor)]
        return list({id(tensor): tensor for tensor in [*parameters, *values]}.values())

    def gradients(self) -> list[Tensor | None]:
        return [member.parameter.grad for member in self.members]

    def take_gradients(self, pending: Pending) -> None:
        """The gradients are complete: they are the part's from now on, whatever becomes of ``p.grad``."""
        with self._lock, unfenced():
            if self._step is None:
                pending.hold(self.gradients())
                self._scalings = take(self.gradients())
                self._taken = [(weakref.ref(each), each._version) for each in self.gradients() if each is not None]
                self._step = self.narrow(self.optimizer, self._groups, self.members)

    def was_overtaken(self, *, may_be_gone: bool) -> bool:
        """Whether gradients have been replaced, changed or dropped since they were taken."""
        with self._lock, unfenced():
            now = [each for each in self.gradients() if each is not None]
            if not self._taken or (may_be_gone and not now):
                return False
            are_same = len(now) == len(self._taken) and all(
                taken() is each and version == each._version
                for each, (taken, version) in zip(now, self._taken, strict=True)
            )
            return not are_same

    @property
    def is_unscaled(self) -> bool:
        """Whether the gradients have been clipped, but not multiplied yet."""
        return bool(self._scalings)

    def scale(self) -> None:
        """Multiply the gradients as clipping asked for, unless that is done; from any thread."""
        with self._lock:
            scalings, self._scalings = self._scalings, []
            for each in scalings:
                each.run()

    def run(self, pending: Pending) -> None:
        self.take_gradients(pending)
        self.scale()
        assert self._step is not None
        self._step()
        self._step = _over  # nothing of the gradients is held any more


def by_unit(catalog: Catalog, everything: Iterable[Member]) -> dict[int, list[Member]]:
    """Return the members of each unit; those outside units belong to none."""
    of_units: dict[int, list[Member]] = {}
    for member in everything:
        if (found := catalog.unit_of_host(member.parameter)) is not None:
            of_units.setdefault(found[0].index, []).append(member)
    return of_units


def _over() -> None:
    """The step of a part that has run."""
