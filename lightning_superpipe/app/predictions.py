"""Predictions become a file: lines of JSON where they are text or numbers, else what ``torch.save`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["write_predictions"]


def write_predictions(batches: Sequence[Any], folder: Path) -> Path:
    """Write predictions of all batches; return the file.

    Args:
        batches: what ``predict_step`` returned, one entry per batch. Lists of texts, or of mappings to texts and
            numbers, become one line of JSON for each sample; anything else is saved as it is.

    Raises:
        OSError: the folder cannot be written.
    """
    samples = list(_samples(batches))
    if samples and all(_is_plain(sample) for sample in samples):
        path = folder / "predictions.jsonl"
        lines = (json.dumps(sample, ensure_ascii=False) for sample in samples)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path
    path = folder / "predictions.pt"
    torch.save(list(batches), path)
    return path


def _samples(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from batch if isinstance(batch, list | tuple) else [batch]


def _is_plain(sample: Any) -> bool:
    """Whether JSON holds the sample without loss."""
    if isinstance(sample, Mapping):
        return all(isinstance(key, str) and _is_plain(value) for key, value in sample.items())
    return isinstance(sample, str | int | float | bool | None)
