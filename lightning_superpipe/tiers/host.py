"""Host memory: page-aligned, of exact size, page-locked where the device can use that."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_superpipe.errors import BudgetError, SuperpipeWarning
from lightning_superpipe.tiers.base import Slab, Tier

__all__ = ["HostSlab", "HostTier"]


class HostSlab(Slab):
    """Anonymous private pages, so that no allocator rounds them up to a power of two; large ones where there are such.

    A direct request to a disk looks up each page of its memory: with large pages it takes a quarter of the processor's
    time, and is two to three times as fast (experiments/07_disk).

    Args:
        on_close: called once it is closed.
    """

    def __init__(self, num_bytes: int, *, pin: bool, on_close: Callable[[HostSlab], None] | None = None) -> None:
        self.num_bytes, self._on_close = num_bytes, on_close
        # Private, not the default shared mapping: forked data loader workers must not see later updates.
        self._pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # other systems; kernels without
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)[:num_bytes]
        self.pinned = pin and num_bytes > 0 and _page_lock(self._bytes)

    @property
    def bytes(self) -> Tensor:
        return self._bytes

    def carve(self, offset: int, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        flat = torch.frombuffer(self._pages, dtype=like.dtype, count=like.numel(), offset=offset)
        # `.data`, for a view would keep `flat` alive: one more owner of the storage, for ever.
        return flat.as_strided(like.size(), like.stride()).data

    def trade(self, other: Slab) -> bool:
        if not isinstance(other, HostSlab) or other.num_bytes != self.num_bytes or other.pinned is not self.pinned:
            return False
        self._pages, other._pages = other._pages, self._pages
        self._bytes, other._bytes = other._bytes, self._bytes
        return True

    def close(self) -> None:
        if self.pinned:
            _driver().cudaHostUnregister(self._bytes.data_ptr())
            self.pinned = False
        if self._on_close is not None:
            self._on_close(self)


class HostTier(Tier):
    """Slabs of host memory.

    Args:
        pin: page-lock every slab. Where the driver refuses, the tier goes on pageable and warns once.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._slabs: dict[int, HostSlab] = {}  # open ones; closed by any thread
        self._parts: dict[str, HostTier] = {}

    def part(self, kind: str, *, pin: bool | None = None) -> HostTier:
        if kind not in self._parts:
            self._parts[kind] = HostTier(pin=self._pin if pin is None else pin)
        return self._parts[kind]

    @property
    def allocated_bytes(self) -> int:
        own = sum(slab.num_bytes for slab in list(self._slabs.values()))
        return own + sum(part.allocated_bytes for part in self._parts.values())

    def holds(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        starts = ((slab.bytes.data_ptr(), slab.num_bytes) for slab in list(self._slabs.values()))
        return any(0 <= address - start < size for start, size in starts) or any(
            part.holds(tensor) for part in self._parts.values()
        )

    def allocate(self, num_bytes: int, *, changes: bool = True) -> HostSlab:
        try:
            slab = HostSlab(num_bytes, pin=self._pin, on_close=self._forget)
        except OSError as error:
            raise BudgetError(
                f"the host has no room for {num_bytes} more bytes ({self.allocated_bytes} are in use by the store): "
                f"{error}. Use a smaller model or more host memory."
            ) from error
        if self._pin and num_bytes > 0 and not slab.pinned:
            self._pin = False
            warnings.warn(
                f"the driver refused to page-lock {num_bytes} bytes of host memory; copies go through pageable memory "
                "and are slower. Raise the locked-memory limit (ulimit -l), or set pin_memory=False to silence this.",
                SuperpipeWarning,
                stacklevel=2,
            )
        self._slabs[id(slab)] = slab
        return slab

    def _forget(self, slab: HostSlab) -> None:
        """Only who holds a closed slab, or what was carved from it, keeps the memory."""
        self._slabs.pop(id(slab), None)

    def close(self) -> None:
        for slab in list(self._slabs.values()):
            slab.close()
        for part in self._parts.values():
            part.close()


def _page_lock(pages: Tensor) -> bool:
    """Register pages with the driver; False where it refuses."""
    return int(_driver().cudaHostRegister(pages.data_ptr(), pages.numel(), 0)) == 0


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
