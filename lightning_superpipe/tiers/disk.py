"""Files: one for each kind of bytes, read and written directly by the engine, mapped for everybody else.

Tensors carved from a slab are ordinary ones whose memory is a shared mapping of the file, so that whoever looks at them
(a checkpoint, an average, a line of the user's) pages them in, and a process with little memory loses the pages again.
The engine's own traffic does not touch the mapping. The kernel keeps the two views of a local file equal: it writes
dirty pages before a direct read, and drops clean ones after a direct write. That is tried out when the first file is
made; where it does not hold, the engine's traffic goes through the page cache as well.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lightning_superpipe.config import Disk
from lightning_superpipe.errors import SuperpipeWarning, TransferError
from lightning_superpipe.tiers.base import StoredSlab, Tier
from lightning_superpipe.tiers.direct_file import BLOCK, DirectFile, padded
from lightning_superpipe.tiers.folder import Folder
from lightning_superpipe.tiers.host import HostSlab
from lightning_superpipe.tiers.mapped import is_mapped
from lightning_superpipe.tiers.pages import SharedPages
from lightning_superpipe.tiers.requests import Requests

__all__ = ["DiskSlab", "DiskTier"]


class DiskSlab(StoredSlab):
    """Bytes of a file, and as many beside them where a step can be undone: it writes to the one, and keeps the other.

    Attributes:
        offset: in the file, of the bytes that count.
    """

    def __init__(self, tier: DiskTier, num_bytes: int, *, changes: bool) -> None:
        self._tier, self._file = tier, tier.file
        self.num_bytes, self.room_bytes = num_bytes, padded(num_bytes)
        self.offset = self._file.region(num_bytes)
        self._spare = self._file.region(num_bytes) if tier.can_undo and changes else None
        self._has_stored = False
        self.is_open = True
        self._pages = SharedPages(self._file.descriptor, self.offset, self.room_bytes) if num_bytes else None
        self._bytes = (
            torch.empty(0, dtype=torch.uint8)
            if self._pages is None
            else torch.frombuffer(self._pages.buffer, dtype=torch.uint8)[:num_bytes]
        )

    @property
    def bytes(self) -> Tensor:
        return self._bytes

    def carve(self, offset: int, like: Tensor) -> Tensor:
        if like.numel() == 0 or self._pages is None:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        if offset + like.nbytes > self.num_bytes:
            raise ValueError(f"{like.nbytes} bytes at offset {offset} do not lie in a slab of {self.num_bytes}")
        flat = torch.frombuffer(self._pages.buffer, dtype=like.dtype, count=like.numel(), offset=offset)
        return flat.as_strided(like.size(), like.stride()).data  # `.data`: as HostSlab.carve

    def note_written(self, num_bytes: int) -> None:
        self._file.count(written=num_bytes)

    def fetch(self, target: Tensor) -> None:
        self._check(target)
        try:
            self._file.read(self.offset, target)
        except OSError as error:
            raise self._error("read", error) from error

    def store(self, source: Tensor) -> None:
        self._check(source)
        assert source.numel() == self.room_bytes or not self._tier.can_undo, "what is written beside is whole"
        is_beside = self._tier.can_undo and not self._has_stored
        try:
            if self._tier.can_undo and self._spare is None:  # it was not expected to change
                self._spare = self._file.region(self.num_bytes)
            self._file.write(self._spare if is_beside and self._spare is not None else self.offset, source)
            if is_beside:
                self._exchange()
                self._has_stored = True
                self._tier.note_stored(self)
        except OSError as error:
            raise self._error("written", error) from error

    def commit(self) -> None:
        self._has_stored = False

    def undo(self) -> None:
        """Let the bytes from before the last step count again."""
        self._has_stored = False
        self._exchange()

    def leave_file(self) -> None:
        """Let the file keep what it has: what is written to the tensors from now on goes to memory."""
        if self._pages is not None:
            self._pages.move(self._file.descriptor, self.offset, writes_through=False)

    def _exchange(self) -> None:
        assert self._spare is not None and self._pages is not None, "only what was stored beside can be exchanged"
        self._pages.move(self._file.descriptor, self._spare)
        self.offset, self._spare = self._spare, self.offset

    def _check(self, memory: Tensor) -> None:
        num_bytes = memory.numel()
        assert self.is_open and num_bytes <= self.room_bytes and not num_bytes % BLOCK, "pages of an open slab"
        assert not memory.data_ptr() % BLOCK, "it begins at a page"

    def _error(self, done: str, error: OSError) -> TransferError:
        return TransferError(
            f"{self.num_bytes} bytes of {self._tier.kind} could not be {done}: {error.strerror or error} "
            f"({str(self._file.path)!r}, offset {self.offset})"
        )

    def close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._spare is not None:
            self._file.give_back(self._spare, self.num_bytes)
        if self._pages is not None:  # somebody may hold what was carved: nobody else gets the bytes before that is gone
            gone = weakref.finalize(self._pages.buffer, self._file.give_back, self.offset, self.num_bytes)
            gone.atexit, self._pages, self._bytes = False, None, torch.empty(0, dtype=torch.uint8)


class DiskTier(Tier):
    """Slabs in one file.

    Args:
        kind: of the bytes; names the file.
        requests: runs the reads and writes.
        with_undo: keep the bytes from before a step.

    Raises:
        UnsupportedError: the file cannot be made.
    """

    is_memory = False

    def __init__(
        self, kind: str, folder: Folder, requests: Requests, options: Disk, *, with_undo: bool = False
    ) -> None:
        self.kind, self._folder = kind, folder
        self.can_undo = with_undo and options.undo
        self._slabs: list[DiskSlab] = []
        self._stored: list[DiskSlab] = []
        try:
            self.file = DirectFile(folder.file(kind), requests, is_named=folder.keeps)
        except OSError as error:
            raise folder.refused(error) from error
        try:
            if self.file.is_direct and not _is_coherent(self.file):
                self.file.go_through_cache()
        except OSError as error:
            self.file.close()
            raise folder.refused(error) from error
        if not self.file.is_direct:
            warnings.warn(
                f"files in {str(folder.path)!r} cannot be read past the page cache: the disk store goes through it, "
                "which costs time and memory. Choose a disk.folder on a local disk.",
                SuperpipeWarning,
                stacklevel=2,
            )

    @property
    def path(self) -> Path:
        """Path of the file, whether it still has that name or not."""
        return self.file.path

    def part(self, kind: str, *, pin: bool | None = None) -> Tier:
        return self

    def reserve(self, sizes: Iterable[int], *, unchanging: Iterable[int] = ()) -> None:
        changing = sum(self._taken_by(size, changes=True) for size in sizes)
        missing = self.file.missing(changing + sum(self._taken_by(size, changes=False) for size in unchanging))
        self._folder.require(missing)
        try:
            self.file.grow(missing)
        except OSError as error:
            raise self._folder.full(missing, error) from error

    def _taken_by(self, num_bytes: int, *, changes: bool) -> int:
        """Bytes of the file that a slab takes."""
        return padded(num_bytes) * (2 if self.can_undo and changes else 1)

    def allocate(self, num_bytes: int, *, changes: bool = True) -> DiskSlab:
        try:
            slab = DiskSlab(self, num_bytes, changes=changes)
        except OSError as error:
            raise self._folder.full(self._taken_by(num_bytes, changes=changes), error) from error
        self._slabs = [*filter(_is_open, self._slabs), slab]
        return slab

    def takes(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or not is_mapped(tensor)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where in the file a tensor lies; None if it lies elsewhere."""
        address = tensor.data_ptr()
        for slab in self.slabs:
            if slab.num_bytes and 0 <= (inside := address - slab.bytes.data_ptr()) < slab.num_bytes:
                return slab.offset + inside
        return None

    def note_written(self, num_bytes: int) -> None:
        self.file.count(written=num_bytes)

    def note_stored(self, slab: DiskSlab) -> None:
        """A slab has been stored beside its bytes from before the step."""
        self._stored.append(slab)

    def commit(self) -> None:
        stored, self._stored = self._stored, []
        for slab in filter(_is_open, stored):
            slab.commit()

    def undo(self) -> None:
        stored, self._stored = self._stored, []
        for slab in filter(_is_open, stored):
            slab.undo()

    @property
    def slabs(self) -> list[DiskSlab]:
        """Those that are open."""
        return list(filter(_is_open, self._slabs))

    @property
    def allocated_bytes(self) -> int:
        return sum(slab.num_bytes for slab in self.slabs)

    @property
    def memory_bytes(self) -> int:
        return 0

    def holds(self, tensor: Tensor) -> bool:
        return self.offset_of(tensor) is not None

    def close(self) -> None:
        """Close the file. Tensors carved from it stay; without a name it lives as long as they do."""
        for slab in self.slabs:
            slab.is_open = False
        self._slabs.clear()
        self.file.close()


def _is_open(slab: DiskSlab) -> bool:
    return slab.is_open


def _is_coherent(file: DirectFile) -> bool:
    """Whether a mapping and direct requests see the same bytes, in both directions."""
    offset = file.region(BLOCK)
    pages = SharedPages(file.descriptor, offset, BLOCK)
    mapped = torch.frombuffer(pages.buffer, dtype=torch.uint8)
    memory = HostSlab(BLOCK, pin=False).bytes
    for number in (1, 2):
        mapped.fill_(number)
        file.read(offset, memory)
        if not memory.eq(number).all():
            return False
        file.write(offset, memory.fill_(number + 100))
        if not mapped.eq(number + 100).all():
            return False
    file.give_back(offset, BLOCK)
    file.num_read_bytes = file.num_written_bytes = 0
    os.fsync(file.descriptor)
    return True
