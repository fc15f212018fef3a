"""Whether the host can hold a training: bytes needed by kind, against what is available."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from humanize import naturalsize

from lightning_superpipe.errors import BudgetError

__all__ = ["HostNeed"]


@dataclass(frozen=True)
class HostNeed:
    """Bytes of host memory that a training takes in all, and what of it is held already.

    Attributes:
        weights: parameters and buffers.
        staging: what waits to be copied or has just landed.
        gradients: of the trained parameters; 0 where nothing is trained.
        states: of the optimizers that are known so far.
        masters: float32 copies of parameters of 2 bytes.
        undo: copies of what a step with files changes in memory, until it is finished.
        held: those of the above that have their memory by now.
        in_files: kinds whose streamed part is in files, and not in the above.
    """

    weights: int
    staging: int = 0
    gradients: int = 0
    states: int = 0
    masters: int = 0
    undo: int = 0
    held: int = 0
    in_files: frozenset[str] = frozenset()

    @property
    def total(self) -> int:
        """All kinds together.

        >>> HostNeed(weights=40, gradients=40, states=80, held=40).total
        160
        """
        return self.weights + self.staging + self.gradients + self.states + self.masters + self.undo

    def with_files(
        self,
        kinds: Collection[str],
        *,
        streamed: int,
        largest: int,
        num_buffers: int,
        undo: bool = False,
        kept: int = 0,
    ) -> HostNeed:
        """What is left in host memory when kinds of bytes live in files.

        Units go there; anchors stay, with their gradients and states. Buffers come in: for units on their way to the
        device, as many for weights that stay from there to their update, and for weights and states on their way to
        their update and back.

        Args:
            kinds: those in files, of ``"weights"``, ``"states"`` and ``"gradients"``.
            streamed: bytes of the weights of all units.
            largest: of the largest unit.
            num_buffers: of each ring.
            undo: a step that fails is undone.
            kept: bytes of ``streamed`` whose weights and states stay in memory.

        >>> need = HostNeed(weights=100, gradients=100, states=200, held=100)
        >>> need.with_files({"weights", "states"}, streamed=90, largest=10, num_buffers=3).total
        280
        >>> need.with_files({"states"}, streamed=90, largest=10, num_buffers=3, undo=True).undo
        90
        """
        moved = streamed - kept
        staying = 1 - moved / max(self.weights, 1)
        per_weight = (self.states + self.masters) / max(self.weights, 1)
        staging, stored = self.staging, {}
        if "weights" in kinds:
            stored["weights"] = self.weights - moved
            staging += num_buffers * largest
        if "states" in kinds:
            stored |= {"states": round(self.states * staying), "masters": round(self.masters * staying)}
        if "gradients" in kinds:
            stored["gradients"] = round(self.gradients * (1 - streamed / max(self.weights, 1)))
        if self.gradients and ("weights" in kinds or "states" in kinds):
            staging += round(num_buffers * largest * (2 * ("weights" in kinds) + per_weight * ("states" in kinds)))
            in_memory = kept + moved * ("weights" not in kinds) + per_weight * (kept + moved * ("states" not in kinds))
            stored["undo"] = round(in_memory) if undo else 0
        return replace(self, staging=staging, in_files=frozenset(kinds), **stored)

    def check(self, *, available: int, limit: int | None) -> None:
        """Raise unless the host can hold it all.

        Args:
            available: bytes that may still be taken.
            limit: the option ``host_memory``: bytes that all may take together, in place of ``available``.

        Raises:
            BudgetError: with the bytes needed and available, and what to do.

        >>> HostNeed(weights=40, states=80, held=40).check(available=80, limit=None)
        """
        if limit is not None and self.total > limit:
            raise BudgetError(f"{self._needed(self.total)}; host_memory allows {_size(limit)}. {self._advice()}")
        if limit is None and self.total - self.held > available:
            raise BudgetError(
                f"{self._needed(self.total)}; {_size(self.held)} are held already, and of the other "
                f"{_size(self.total - self.held)} the host has {_size(available)} available. {self._advice()} If more "
                "is free than that, say so with host_memory."
            )

    def _needed(self, total: int) -> str:
        kinds = {
            "weights": self.weights,
            "staging": self.staging,
            "gradients": self.gradients,
            "optimizer states": self.states,
            "float32 masters": self.masters,
            "copies for disk.undo": self.undo,
        }
        listed = ", ".join(f"{_size(size)} of {kind}" for kind, size in kinds.items() if size)
        return f"training needs {_size(total)} of host memory: {listed}"

    def _advice(self) -> str:
        """Name what would take less of the kind that takes most."""
        ways = ["train fewer parameters (adapters)"]
        if not {"weights", "states"} <= self.in_files:
            ways.append("put weights and states into files (store='disk')")
        elif self.gradients and "gradients" not in self.in_files:
            ways.append("put gradients into files too (gradients: disk in store)")
        if self.in_files:
            ways.append("use fewer buffers (disk.ring) or smaller units")
        if self.states:
            ways.append("take an optimizer with smaller states (Adafactor, SGD)")
        if self.masters:
            ways.append("leave master_weights out")
        if self.undo:
            ways.append("set disk.undo=False")
        return f"Use a host with more memory, or {', or '.join(ways)}."


def _size(num_bytes: int) -> str:
    return f"{naturalsize(num_bytes, binary=True)} ({num_bytes} bytes)"
