"""Records from JSON lines, Parquet, a saved data set, or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import require

__all__ = ["read_records"]

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SHOWN = 60  # characters of a bad line


def read_records(source: str, *, split: str = "train", cache_dir: str | None = None) -> Any:
    """Return the records as a ``datasets.Dataset``.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder that ``save_to_disk`` wrote, or a hub name.
        split: of a saved or hub data set that has several.
        cache_dir: where ``datasets`` keeps its copy; None is its own place.

    Raises:
        ConfigError: nothing is there, it is empty, or it cannot be read; a corrupt line is named by its number.
    """
    path = Path(source)
    if path.is_dir():
        records = _load_saved(path, split)
    elif path.suffix in _FORMATS:
        records = _load_file(path, cache_dir)
    else:
        records = _load_named(source, split, cache_dir)
    if len(records) == 0:
        raise _nothing_in(source)
    return records


def _nothing_in(source: str) -> ConfigError:
    return ConfigError(f"{source!r} holds no records: there is nothing to learn from.")


def _load_file(path: Path, cache_dir: str | None) -> Any:
    """Read one file in a format known by its name."""
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} does not exist (looked in {str(path.parent.absolute())!r}).")
    if path.stat().st_size == 0:
        raise ConfigError(f"{str(path)!r} is empty: there is nothing to learn from.")
    kind = _FORMATS[path.suffix]
    if kind == "json":
        _refuse_corrupt_line(path)
    datasets = require("datasets")
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache_dir)
    except Exception as error:  # whatever lies beneath `datasets`: its own errors, arrow's, the operating system's
        raise ConfigError(f"{str(path)!r} cannot be read as {kind}: {_root_of(error)}") from error


def _refuse_corrupt_line(path: Path) -> None:
    """Raise ConfigError for the first line that is no JSON object; ``datasets`` would not tell its number."""
    if path.suffix == ".json":  # may be one array over many lines
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                reason = f"is not JSON ({error})"
            else:
                if isinstance(record, dict):
                    continue
                reason = f"is a {type(record).__name__}, not an object"
            shown = line[:_SHOWN].decode(errors="replace").strip()
            raise ConfigError(f"{str(path)!r}, line {number} {reason}: {shown!r}. Mend or remove that line.")


def _load_saved(path: Path, split: str) -> Any:
    """Read a folder that ``save_to_disk`` wrote."""
    datasets = require("datasets")
    if (path / "state.json").exists() and not any(path.glob("*.arrow")):  # an empty one; `datasets` cannot read it
        raise _nothing_in(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        names = ", ".join(sorted(item.name for item in path.iterdir())) or "nothing"
        raise ConfigError(
            f"{str(path)!r} is not a saved data set (it holds {names}). Give a folder that save_to_disk wrote, or a "
            "file ending in .jsonl, .json or .parquet."
        ) from error
    return _choose_split(found, str(path), split)


def _load_named(source: str, split: str, cache_dir: str | None) -> Any:
    """Read a data set of the hub."""
    datasets = require("datasets")
    try:
        found = datasets.load_dataset(source, cache_dir=cache_dir)
    except Exception as error:  # as above, and the network's
        raise ConfigError(
            f"{source!r} is neither a file ending in .jsonl, .json or .parquet, nor the folder of a saved data set, "
            f"nor a data set on the hub that can be reached from here: {_root_of(error)}"
        ) from error
    return _choose_split(found, source, split)


def _choose_split(found: Any, source: str, split: str) -> Any:
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ConfigError(f"{source!r} has no split {split!r}; it has {', '.join(found)}.")
    return found[split]


def _root_of(error: BaseException) -> str:
    """The message of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
