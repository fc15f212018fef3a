"""What a tier offers: exact-size memory, carved into tensors that each own their storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

__all__ = ["Slab", "StoredSlab", "Tier"]


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

    def note_written(self, num_bytes: int) -> None:
        """So many bytes have been written to tensors carved from the slab, for those who count."""
        return

    def trade(self, other: Slab) -> bool:
        """Exchange memory with another slab, and with it the bytes; return whether that is possible.

        What was carved from either keeps the memory that it has.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Give back what the device knows of this memory (page locks). Tensors carved from it stay valid."""


class StoredSlab(Slab):
    """A slab that does not lie in memory: ``bytes`` and what is carved from it are paged in when somebody looks.

    The engine's own traffic goes by :meth:`fetch` and :meth:`store`, which block, and leave no pages behind. Nobody may
    write to the slab's tensors meanwhile.

    Attributes:
        room_bytes: of the memory that :meth:`fetch` fills, at least ``num_bytes``; it begins at a page.
    """

    room_bytes: int

    @abstractmethod
    def fetch(self, target: Tensor) -> None:
        """Read the slab, or its first pages, into host memory, shape (room_bytes or less,), uint8.

        Raises:
            TransferError: the read failed, or came back short.
        """

    @abstractmethod
    def store(self, source: Tensor) -> None:
        """Replace the slab by host memory, shape (room_bytes,), uint8; see :meth:`Tier.commit`.

        Where nothing can be undone, its first pages may be replaced alone.

        Raises:
            TransferError: the write failed; what the slab holds is as before where the tier can undo.
        """


class Tier(ABC):
    """An allocator of slabs, in host memory or in files; shared memory would fit the same calls.

    Attributes:
        is_memory: its slabs lie in host memory.
        can_undo: what was stored since the last :meth:`commit` can be undone.
    """

    is_memory: bool = True
    can_undo: bool = False

    @abstractmethod
    def allocate(self, num_bytes: int, *, changes: bool = True) -> Slab:
        """Return a new slab.

        Args:
            changes: steps will store to it; where they can be undone, it has room for what was before them.

        Raises:
            BudgetError: the tier has no room for it.
        """

    def reserve(self, sizes: Iterable[int], *, unchanging: Iterable[int] = ()) -> None:
        """Make sure that slabs of these sizes can be allocated later, beside those that there are.

        Args:
            unchanging: sizes of further slabs, to which no step will store.

        Raises:
            BudgetError: the tier has no room for them.
        """
        return

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor shall move here. What the user has put into read-only files may stay there."""
        return True

    def note_written(self, num_bytes: int) -> None:
        """So many bytes have been written to tensors carved from slabs, for those who count."""
        return

    def commit(self) -> None:
        """What was stored so far stays: a step is finished."""
        return

    def undo(self) -> None:
        """Take back all that was stored since the last :meth:`commit`."""
        return

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

    @property
    def memory_bytes(self) -> int:
        """Bytes of ``allocated_bytes`` that are host memory."""
        return self.allocated_bytes

    @abstractmethod
    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of its slabs, those of its parts included."""

    @abstractmethod
    def close(self) -> None:
        """Close every slab."""
