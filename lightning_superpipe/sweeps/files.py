"""The folder of a sweep: one JSON file a job, each whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from humanize import naturalsize

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.sweeps.row import Row

__all__ = ["CorruptRow", "Rows", "fingerprint", "known_row", "read_rows", "replacing", "write_row"]

_FOLDER = "rows"
_NUM_DIGITS = 16


class CorruptRow(NamedTuple):
    """A file among the rows that is none, and why."""

    path: Path
    reason: str


class Rows(NamedTuple):
    """All that a sweep has found so far.

    Attributes:
        good: the rows; those without streaming first, then by k and k'.
        corrupt: files that could not be read.
    """

    good: tuple[Row, ...]
    corrupt: tuple[CorruptRow, ...]


def fingerprint(config: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Return a short name for what was asked and the software that answers; the order of keys does not matter.

    >>> fingerprint({"k": 2, "seed": 0}, {}) == fingerprint({"seed": 0, "k": 2}, {})
    True
    >>> fingerprint({"k": 2}, {"torch": "2.12.0"}) == fingerprint({"k": 2}, {"torch": "2.13.0"})
    False
    """
    text = json.dumps([config, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_NUM_DIGITS]


def write_row(folder: Path, row: Row) -> Path:
    """Write a row below the folder of its sweep; one of the same job from before is replaced.

    Raises:
        SuperpipeError: it cannot be written; all other rows are intact.
    """
    path = _path_of(folder, row.fingerprint)
    with replacing(path) as draft:
        draft.write_text(row.to_json(), encoding="utf-8")
    return path


def known_row(folder: Path, name: str) -> Row | None:
    """Return the row with this fingerprint; None if there is none that can be read."""
    try:
        return Row.from_json(_path_of(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_rows(folder: Path) -> Rows:
    """Read all rows of a sweep; what cannot be read is named.

    Raises:
        SuperpipeError: there is no such folder, or nothing in it was written by a sweep.
    """
    if not folder.is_dir():
        raise SuperpipeError(
            f"{str(folder)!r} is {'a file' if folder.exists() else 'not there'}: name the folder of a sweep, "
            "the one that holds `rows/` (hydra.sweep.dir)."
        )
    paths = sorted((folder / _FOLDER).glob("*.json"))
    if not paths:
        raise SuperpipeError(
            f"{str(folder)!r} holds no rows of a sweep (rows/*.json): name the folder of a sweep (hydra.sweep.dir) in "
            "which at least one job has ended."
        )
    good, corrupt = [], []
    for path in paths:
        try:
            good.append(Row.from_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            corrupt.append(CorruptRow(path, f"{type(error).__name__}: {error}"))
    return Rows(tuple(sorted(good, key=_place)), tuple(corrupt))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft beside ``path`` to write to, which then takes its place as a whole.

    Raises:
        SuperpipeError: it cannot be written; a file of that name from before is as it was.
    """
    draft = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())  # a full disk may show only now; a crash later must not find an empty file
        os.replace(draft, path)
    except OSError as error:
        raise SuperpipeError(_refusal(path, error)) from error
    finally:
        with contextlib.suppress(OSError):  # it took its place, or was never made
            draft.unlink()


def _path_of(folder: Path, name: str) -> Path:
    return folder / _FOLDER / f"{name}.json"


def _place(row: Row) -> tuple[bool, bool, int, int, str]:
    return row.is_streamed, isinstance(row.k, int), *row.window, row.fingerprint


def _refusal(path: Path, reason: OSError) -> str:
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    left = naturalsize(shutil.disk_usage(existing).free, binary=True)
    return (
        f"{str(path)!r} could not be written: {reason.strerror or reason} ({left} are free there). Everything written "
        "before is intact. Make room or allow writing, and give the same command again: finished jobs are not repeated."
    )
