"""Casts between dtypes on the host, by the calling thread alone: torch's own would take the cores from compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_superpipe.partition.anchors import is_dense

__all__ = ["add_into", "cast_into", "take_changes", "write_home"]

# Elements. torch runs operations of up to this size in the calling thread (its grain size).
_CHUNK = 1 << 15
_DEVICE_CHUNK = 1 << 24  # what a device needs beside the tensors stays small
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cast_into(target: Tensor, source: Tensor) -> None:
    """Copy values from one dtype to another; equal sizes, host memory.

    Cost: about 2 * 10^9 elements per second and core, float32 to bfloat16.

    >>> target = torch.empty(2, dtype=torch.bfloat16)
    >>> cast_into(target, torch.tensor([1.0, 1.001]))
    >>> target.tolist()
    [1.0, 1.0]
    """
    for into, values in _chunks(target, source):
        into.copy_(values)


def add_into(target: Tensor, source: Tensor) -> None:
    """Add values of another dtype; equal sizes, host memory."""
    for into, values in _chunks(target, source):
        into.add_(values)


def take_changes(master: Tensor, narrow: Tensor) -> int:
    """Let the master follow where its rounded copy was written to; return how many elements had been.

    Elsewhere the master keeps the digits that the copy cannot hold.

    Args:
        master: the wider tensor, in host memory.
        narrow: what was ``master.to(narrow.dtype)`` until somebody wrote to it, of equal size.

    >>> master, narrow = torch.tensor([1.001, 2.0]), torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    >>> take_changes(master, narrow), master
    (1, tensor([1.0010, 3.0000]))
    """
    num_changed = 0
    for into, now in _chunks(master, narrow):
        bits = _BITS[narrow.itemsize]
        rounded, wanted = into.to(narrow.dtype).view(bits), now.contiguous().view(bits)
        if not torch.equal(rounded, wanted):
            changed = rounded != wanted
            num_changed += int(changed.sum())
            into.copy_(torch.where(changed, now.to(into.dtype), into))
    return num_changed


def write_home(host: Tensor, device_copy: Tensor) -> None:
    """Bring home what was written to a device copy; a copy in another dtype changes only what was written."""
    if host.dtype is device_copy.dtype:
        host.copy_(device_copy)
    else:
        take_changes(host, device_copy.to("cpu"))


def _chunks(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of two tensors, each small enough for one thread."""
    size = _CHUNK if target.device.type == "cpu" else _DEVICE_CHUNK
    if target.numel() > size and target.stride() == source.stride() and is_dense(target):
        yield from zip(torch.split(_flat(target), size), torch.split(_flat(source), size), strict=True)
    else:
        yield target, source


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))
