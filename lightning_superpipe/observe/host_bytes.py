"""Host memory of training: what is held by kind, measured, and what the machine has available."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

__all__ = ["HostBytes", "available_bytes", "storage_bytes"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


class HostBytes(NamedTuple):
    """Bytes in host memory by kind.

    Attributes:
        weights: parameters and buffers, in the store or where their user put them.
        staging: what waits to be copied or has just landed, and what is cast.
        gradients: memory that gradients live in.
        states: of optimizers, masters included.

    >>> HostBytes(weights=40, staging=2, gradients=10, states=80).per(10)
    (4.0, 0.2, 1.0, 8.0)
    """

    weights: int = 0
    staging: int = 0
    gradients: int = 0
    states: int = 0

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self)

    def per(self, num_parameters: int) -> tuple[float, ...]:
        """Each kind, bytes per parameter."""
        return tuple(size / max(num_parameters, 1) for size in self)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece counted once.

    >>> base = torch.zeros(4)
    >>> storage_bytes([base, base[:2], torch.zeros(2)])
    24
    """
    with torch._C.DisableTorchFunctionSubclass():  # sizes need not wait for updates under way
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def available_bytes() -> int:
    """Bytes that this process may still take: what the machine has available, or its control group leaves."""
    return min([int(psutil.virtual_memory().available), *_left_by_groups(_CGROUPS, _OWN_GROUP)])


def _left_by_groups(root: Path, own: Path) -> Iterator[int]:
    """What each control group around this process leaves (Linux, versions 2 and 1)."""
    lines = own.read_text().splitlines() if own.exists() else []
    for folder in _around(root, lines, "::"):
        yield from _left(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _around(root / "memory", lines, ":memory:"):
        yield from _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _around(root: Path, lines: Sequence[str], mark: str) -> list[Path]:
    """The folders of the groups around this process, its own first."""
    inside = next((line.partition(mark)[2] for line in lines if mark in line), "/").strip("/")
    group = root / inside
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    try:
        words = (folder / "memory.stat").read_text().split()
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
    except (OSError, ValueError):  # no such group, or a root without limits
        return
    cache = dict(zip(words[::2], words[1::2], strict=False))
    if most.isdigit():
        yield max(0, int(most) - now + int(cache.get(reclaimable, 0)))
