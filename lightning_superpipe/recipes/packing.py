"""Rows of a batch: one example each, or several that do not see each other."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_superpipe.recipes.conversations import MASKED, Example

__all__ = ["join_packed", "join_padded", "join_prompts", "pack"]

Row = Sequence[Example]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over rows, the longest first, each into the fullest row where it fits.

    Args:
        lengths: of the examples, none above ``capacity``.
        capacity: tokens in a row.
    Returns:
        The indices of the examples in each row.

    >>> pack([5, 3, 4, 2], capacity=7)
    [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left and whose, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


def join_padded(rows: Sequence[Row], *, pad: int) -> dict[str, Tensor]:
    """Return a batch with one example in a row, padded on the right.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, each of shape (B, T).
    """
    examples = [row[0] for row in rows]
    length = max(len(example.input_ids) for example in examples)
    mask = [torch.ones_like(example.input_ids) for example in examples]
    return {
        "input_ids": _stack([example.input_ids for example in examples], length, pad),
        "labels": _stack([example.labels for example in examples], length, MASKED),
        "attention_mask": _stack(mask, length, 0),
    }


def join_packed(rows: Sequence[Row], *, pad: int) -> dict[str, Tensor]:
    """Return a batch with several examples in a row.

    Positions start again with each example. From that transformers derives block-diagonal attention, and so no example
    sees another; the first token of each is never predicted. Padding counts as one more example.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each of shape (B, T).
    """
    length = max(sum(len(example.input_ids) for example in row) for row in rows)
    ids, labels, positions = [], [], []
    for row in rows:
        num_missing = length - sum(len(example.input_ids) for example in row)
        ids.append(torch.cat([example.input_ids for example in row]))
        labels.append(torch.cat([part for example in row for part in (torch.tensor([MASKED]), example.labels[1:])]))
        parts = [torch.arange(len(example.input_ids)) for example in row]
        positions.append(torch.cat([*parts, torch.arange(num_missing)]))
    return {
        "input_ids": _stack(ids, length, pad),
        "labels": _stack(labels, length, MASKED),
        "position_ids": torch.stack(positions),
    }


def join_prompts(prompts: Sequence[Tensor], *, pad: int) -> dict[str, Tensor]:
    """Return prompts padded on the left, as generation needs them.

    Returns:
        ``input_ids`` and ``attention_mask``, each of shape (B, T).
    """
    length = max(len(prompt) for prompt in prompts)
    mask = [torch.ones_like(prompt) for prompt in prompts]
    return {
        "input_ids": _stack([prompt.flip(0) for prompt in prompts], length, pad).flip(1),
        "attention_mask": _stack(mask, length, 0).flip(1),
    }


def _stack(rows: Sequence[Tensor], length: int, fill: int) -> Tensor:
    """Stack rows of different length, filled on the right."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=fill) for row in rows])
