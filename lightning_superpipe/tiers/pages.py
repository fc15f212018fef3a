"""Pages of a file as memory: mapped and shared, at an address that stays when the pages come from elsewhere."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import Any

__all__ = ["SharedPages", "trim_heap"]

_FAILED = ctypes.c_void_p(-1).value
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10  # Linux, and the BSDs; Python has no name for it


class SharedPages:
    """A part of a file in the address space; what is written to it reaches the file.

    The pages live as long as anybody holds ``buffer`` or what was made from it, whatever becomes of the file's name.

    Args:
        descriptor: of a file that is open for reading and writing; not needed any more afterwards.
        offset: of the first byte, a multiple of the page size.
        num_bytes: at least 1.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._address = _map(None, num_bytes, mmap.MAP_SHARED, descriptor, offset)
        kind: Any = type("_Pages", (ctypes.c_char * num_bytes,), {})
        self.buffer: Any = kind.from_address(self._address)
        # Tensors made from the buffer hold it. At exit the system takes the pages, and not before the last tensor.
        weakref.finalize(self.buffer, _unmap, self._address, num_bytes).atexit = False

    def move(self, descriptor: int, offset: int, *, writes_through: bool = True) -> None:
        """Show another part of a file at the same address: one step, as other threads see it.

        Args:
            writes_through: what is written reaches the file; else it goes to memory of its own.

        Raises:
            OSError: the system refuses; the pages are as before.
        """
        kind = mmap.MAP_SHARED if writes_through else mmap.MAP_PRIVATE
        _map(self._address, self.num_bytes, kind | _MAP_FIXED, descriptor, offset)


def trim_heap() -> None:
    """Let the C library give back what nobody uses: freed tensors between small ones would stay with it for ever."""
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:  # glibc
        trim(0)


def _map(address: int | None, num_bytes: int, flags: int, descriptor: int, offset: int) -> int:
    found = _libc().mmap(address, num_bytes, _PROTECTION, flags, descriptor, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (mapping {num_bytes} bytes of a file)")
    return int(found)


def _unmap(address: int, num_bytes: int) -> None:
    _libc().munmap(address, num_bytes)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_longlong,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
