"""What a tier offers: exact-size memory, carved into tensors that each own their storage."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["Slab", "Tier"]


class Slab(ABC):
    """One piece of memory of an exact size."""

    num_bytes: int

    @property
    @abstractmethod
    def bytes(self) -> Tensor:
        """The whole slab, shape (num_bytes,), uint8."""

    @abstractmethod
    def carve(self, offset: int, like: Tensor) -> Tensor:
        """Return a tensor over the slab with the dtype, sizes and strides of ``like``, ``offset`` bytes from its start.

        The tensor has a storage of its own of exactly its bytes: saving it to a file writes no neighbour.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the device knows of this memory (page locks). Tensors carved from it stay valid."""


class Tier(ABC):
    """An allocator of slabs: host memory today; files or shared memory fit the same calls."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> Slab:
        """Return a new slab.

        Raises:
            BudgetError: the tier has no room for it.
        """

    @abstractmethod
    def part(self, kind: str, *, pin: bool | None = None) -> Tier:
        """Return the part of this tier that holds bytes of one kind, always the same; it closes with the tier.

        Args:
            pin: page-lock its slabs, from the first call on; None as the tier does.
        """

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes of the slabs handed out, those of its parts included."""

    @abstractmethod
    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of its slabs, those of its parts included."""

    @abstractmethod
    def close(self) -> None:
        """Close every slab."""
