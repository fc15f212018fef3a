"""What a run keeps: weights and optimizer states in its files, and a manifest that says where each lies."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.tiers.direct_file import BLOCK
from lightning_superpipe.tiers.disk import DiskTier
from lightning_superpipe.tiers.folder import DRAFT, MANIFEST
from lightning_superpipe.tiers.pages import SharedPages

__all__ = ["Kept", "Named", "keep", "named_tensors", "open_kept"]

_FORMAT = "lightning_superpipe.kept"
_VERSION = 1


class Named(NamedTuple):
    """A tensor to be kept; ``name`` is unique among those of its kind."""

    name: str
    tensor: Tensor


class Kept(NamedTuple):
    """What a run has kept, mapped from its files; what is written to a tensor changes the file.

    Attributes:
        weights: parameters and buffers by name.
        states: of optimizers, by the parameter's name and the state's (``"0.weight/exp_avg"``).
    """

    weights: dict[str, Tensor]
    states: dict[str, Tensor]


def named_tensors(root: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, list[Named]]:
    """Return all that a run may keep, by kind."""
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    weights = [Named(name, tensor.detach()) for name, tensor in (*root.named_parameters(), *root.named_buffers())]
    states = [
        Named(f"{names[id(parameter)]}/{key}", value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if id(parameter) in names and isinstance(state, dict)
        for key, value in state.items()
        if isinstance(value, Tensor)
    ]
    return {"weights": weights, "states": states}


def keep(folder: Path, kinds: Sequence[tuple[DiskTier, Iterable[Named]]]) -> None:
    """Write the manifest of the tensors; those that are in no file yet are added to the one of their kind.

    Raises:
        BudgetError: the disk has no room for them.
        OSError: the manifest cannot be written.
    """
    entries: dict[str, dict[str, Any]] = {}
    for tier, named in kinds:
        entries[tier.kind] = {name: _entry(tier, tensor) for name, tensor in named}
        os.fsync(tier.file.descriptor)
    draft = folder / DRAFT
    draft.write_text(json.dumps({"format": _FORMAT, "version": _VERSION, "tensors": entries}), encoding="utf-8")
    os.replace(draft, folder / MANIFEST)
    for tier, _ in kinds:  # the model may be trained further, in memory
        for slab in tier.slabs:
            slab.leave_file()


def _entry(tier: DiskTier, tensor: Tensor) -> dict[str, Any]:
    at = tier.offset_of(tensor)
    if at is None:
        slab = tier.allocate(tensor.nbytes)
        tensor = slab.carve(0, tensor).copy_(tensor)
        at = slab.offset
    layout = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    return {"offset": at, **layout, "stride": list(tensor.stride()), "crc32": _checksum(tensor)}


def open_kept(folder: str | Path) -> Kept:
    """Return the weights and states that a run has left in a folder (``disk.keep``), each checked against its checksum.

    Raises:
        UnsupportedError: the folder holds none, or a file is truncated or altered; the tensor is named.
    """
    place = Path(folder)
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        kinds = {"weights": {}, "states": {}, **manifest["tensors"]} if manifest["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(
            f"the folder {str(place)!r} holds nothing that a run has kept ({error}): a run that is killed keeps "
            "nothing. Go on from the last checkpoint."
        ) from error
    if kinds is None or manifest["version"] != _VERSION:
        raise UnsupportedError(f"{str(place / MANIFEST)!r} is of another format or version than {_FORMAT} {_VERSION}.")
    found = {kind: _open(place / f"{kind}.bytes", entries) for kind, entries in kinds.items()}
    return Kept(found["weights"], found["states"])


def _open(path: Path, entries: dict[str, Any]) -> dict[str, Tensor]:
    if not entries:
        return {}
    try:
        size = path.stat().st_size // BLOCK * BLOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(f"{str(path)!r} cannot be opened: {error.strerror}. Go on from a checkpoint.") from error
    try:
        pages = SharedPages(descriptor, 0, max(size, BLOCK))
    finally:
        os.close(descriptor)
    return {name: _tensor(path, name, entry, pages, size) for name, entry in entries.items()}


def _tensor(path: Path, name: str, entry: dict[str, Any], pages: SharedPages, size: int) -> Tensor:
    like = torch.empty_strided(entry["shape"], entry["stride"], dtype=getattr(torch, entry["dtype"]), device="meta")
    if not like.numel():
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
    if entry["offset"] + like.nbytes > size:
        raise UnsupportedError(f"{_damaged(path, name)}: it is truncated to {size} bytes. Go on from a checkpoint.")
    flat = torch.frombuffer(pages.buffer, dtype=like.dtype, count=like.numel(), offset=entry["offset"])
    tensor = flat.as_strided(like.size(), like.stride()).data
    if _checksum(tensor) != entry["crc32"]:
        raise UnsupportedError(f"{_damaged(path, name)}: its checksum is another. Go on from a checkpoint.")
    return tensor


def _damaged(path: Path, name: str) -> str:
    return f"{str(path)!r} is damaged at {name!r}"


def _checksum(tensor: Tensor) -> int:
    """Of the bytes as they lie in memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return zlib.crc32(flat.numpy()) if tensor.numel() else 0  # type: ignore[arg-type]  # arrays are buffers
