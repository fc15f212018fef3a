"""Text that every machine has: the source code of Python's own standard library, as bytes."""

from __future__ import annotations

import math
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_superpipe.errors import SuperpipeError

__all__ = [
    "FILE_END",
    "Corpus",
    "HeldOutWindows",
    "RandomWindows",
    "is_held_out",
    "read_standard_library",
    "source_files",
    "standard_library",
]

FILE_END = 0
"""The byte after each file; source code has none of it."""

# Tests are missing in many distributions; the others are tables and prose rather than code.
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data", "lib2to3")
)
_HELD_OUT_SHARE = 20  # every 20th file or so
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """Source files, one after the other.

    Attributes:
        train: shape (N,), uint8.
        held_out: whole files that training never sees, shape (M,), uint8.
        num_train_files: files in ``train``.
        num_held_out_files: files in ``held_out``.
    """

    train: Tensor
    held_out: Tensor
    num_train_files: int
    num_held_out_files: int

    def frequency_bits(self) -> float:
        """Bits per held-out byte of a model that knows only how often each byte occurs."""
        counts = torch.bincount(self.train.long(), minlength=256).double() + 1  # none is impossible
        nats: float = -(counts / counts.sum()).log()[self.held_out.long()].mean().item()
        return nats / math.log(2)


def read_standard_library(root: Path | None = None) -> Corpus:
    """Read the ``.py`` files of the running Python's library, by path; a file's own path decides if it is held out.

    Args:
        root: another folder of Python files.

    Raises:
        SuperpipeError: there is hardly any source, as where Python came with compiled files only.
    """
    root = standard_library() if root is None else root
    names = source_files(root)
    held_out = [name for name in names if is_held_out(name)]
    train = [name for name in names if not is_held_out(name)]
    corpus = Corpus(_join(root, train), _join(root, held_out), len(train), len(held_out))
    if min(len(corpus.train), _HELD_OUT_SHARE * len(corpus.held_out)) < _LEAST_BYTES:
        raise SuperpipeError(
            f"{str(root)!r} holds {len(corpus.train) + len(corpus.held_out)} bytes of Python source, too little to "
            "learn from. Use a Python that comes with its library's source."
        )
    return corpus


def standard_library() -> Path:
    """Return the folder of the running Python's library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[str]:
    """Return the ``.py`` files below a folder, sorted, as paths relative to it; tests and tables are left out."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [name for name in names if not _LEFT_OUT & set(name.split("/"))]


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training; adding files elsewhere moves none.

    >>> [name for name in ("ast.py", "copy.py", "json/decoder.py") if is_held_out(name)]
    ['copy.py']
    """
    return zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0


def _join(root: Path, names: list[str]) -> Tensor:
    joined = b"".join((root / name).read_bytes() + bytes([FILE_END]) for name in names)
    return torch.frombuffer(bytearray(joined or b"\0"), dtype=torch.uint8)


class RandomWindows(Dataset[Tensor]):
    """Windows of a text at random places, the same ones for the same seed; each has shape (num_bytes,), int64."""

    def __init__(self, text: Tensor, num_windows: int, num_bytes: int, *, seed: int) -> None:
        """Choose all places now."""
        chance = torch.Generator().manual_seed(seed)
        self._text, self._num_bytes = text, num_bytes
        self._starts = torch.randint(len(text) - num_bytes, (num_windows,), generator=chance).tolist()

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        """Return one window."""
        start = self._starts[index]
        return self._text[start : start + self._num_bytes].long()


class HeldOutWindows(RandomWindows):
    """Windows at even distances over the whole text."""

    def __init__(self, text: Tensor, num_windows: int, num_bytes: int) -> None:
        """Choose all places now."""
        super().__init__(text, 0, num_bytes, seed=0)
        last = len(text) - num_bytes
        self._starts = [last * index // max(num_windows - 1, 1) for index in range(num_windows)]
