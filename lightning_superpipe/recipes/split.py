"""What is held out of records that come without a held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from lightning_superpipe.errors import ConfigError

__all__ = ["hold_out"]

Record = TypeVar("Record")


def hold_out(records: Sequence[Record], *, share: float, seed: int, source: str) -> tuple[list[Record], list[Record]]:
    """Divide records at random into those to learn from and held-out ones, both in their order.

    Args:
        share: of the records that is held out, at least one.
        seed: of the choice.
        source: where they come from, for errors.

    Raises:
        ConfigError: the share is none, or nothing is left to learn from.

    >>> hold_out("abcdefgh", share=0.25, seed=0, source="letters")
    (['b', 'c', 'd', 'f', 'g', 'h'], ['a', 'e'])
    """
    num_held_out = max(1, round(share * len(records)))
    if not 0 < share < 1 or num_held_out >= len(records):
        raise ConfigError(
            f"{source!r} has {len(records)} records, and held_out_share={share} leaves none to train on or none to "
            "validate on. Give a share between 0 and 1, a held-out source, or more records."
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:num_held_out])
    return (
        [record for index, record in enumerate(records) if index not in chosen],
        [record for index, record in enumerate(records) if index in chosen],
    )
