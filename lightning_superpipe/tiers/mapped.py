"""Read-only files as memory: the tensors of a safetensors checkpoint, where they are, without a copy."""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superpipe.errors import ConfigError

__all__ = ["is_mapped", "map_safetensors"]

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8

_ranges: dict[int, tuple[int, int]] = {}
"""Of each mapping that is alive, its address and its bytes."""


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that :func:`map_safetensors` has mapped."""
    if not _ranges or tensor.layout is not torch.strided or not tensor.numel():
        return False
    address = tensor.data_ptr()
    return any(start <= address < start + size for start, size in list(_ranges.values()))


def map_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as they lie in its files, by name.

    Nothing is read until somebody looks, and nothing is ever written: what is written to a tensor goes to memory of its
    own. The files must stay as they are meanwhile.

    Args:
        path: a file, or a folder with one file or with several and their index.

    Raises:
        ConfigError: there is no such checkpoint, or a file is truncated or of another format.
    """
    return {name: tensor for file in _files(Path(path)) for name, tensor in _tensors(file)}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{str(index)!r} is no index of a safetensors checkpoint: {error}.") from error
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no safetensors file"
        raise ConfigError(f"{str(path)!r} {what}. Give a folder that save_pretrained(...) has written, or a file.")
    return files


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        header = _header(file, opened.read(_LENGTH_BYTES), size)
        entries: dict[str, Any] = _parsed(file, opened.read(header))
        # Private: a write makes a copy of the page. Closed when the last tensor is gone.
        pages = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    entries.pop("__metadata__", None)
    start = _LENGTH_BYTES + header
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    key = id(pages)
    _ranges[key] = (whole.data_ptr(), size)
    weakref.finalize(pages, _ranges.pop, key, None)
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise ConfigError(f"{str(file)!r}: tensor {name!r} has dtype {entry['dtype']}, which is not known.")
        if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
            raise ConfigError(
                f"{str(file)!r} is damaged: tensor {name!r} needs the bytes {begin} to {end} of {size - start}. "
                "Fetch or save the file again."
            )
        yield name, _tensor(pages, start + begin, dtype, shape)


def _tensor(pages: mmap.mmap, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # allowed by the format, but no tensor can lie there
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).view(shape)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(shape).data


def _header(file: Path, length: bytes, size: int) -> int:
    number = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or number > size - _LENGTH_BYTES:
        raise ConfigError(f"{str(file)!r} is no safetensors file, or it is truncated: it has {size} bytes.")
    return number


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{str(file)!r} is no safetensors file: {error}.") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{str(file)!r} is no safetensors file: its header is no mapping.")
    return parsed
