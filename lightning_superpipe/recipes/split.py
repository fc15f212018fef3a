"""What to learn from, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from lightning_superpipe.errors import ConfigError

__all__ = ["Sources", "hold_out"]

Record = TypeVar("Record")
Records = TypeVar("Records")


class Sources(NamedTuple):
    """Where records are, and what is held out.

    Attributes:
        source: a file, a folder, or a hub name.
        held_out: likewise; None holds a share of ``source`` out.
        share: of the records.
        split, held_out_split: of data sets that have several.
        seed: of what is held out.
    """

    source: str
    held_out: str | None
    share: float
    split: str
    held_out_split: str
    seed: int

    def read(
        self, read: Callable[[str, str], Records], select: Callable[[Any, list[int]], Any] | None = None
    ) -> tuple[Records, Records]:
        """Return what to learn from, and what is held out.

        Args:
            read: returns the records of a source and a split.
            select: returns those at some positions, for records that are not in memory; None makes lists.
        """
        records: Any = read(self.source, self.split)
        if self.held_out is not None:
            return records, read(self.held_out, self.held_out_split)
        if select is None:
            return hold_out(records, share=self.share, seed=self.seed, source=self.source)  # type: ignore[return-value]
        parts = hold_out(range(len(records)), share=self.share, seed=self.seed, source=self.source)
        return select(records, parts[0]), select(records, parts[1])


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
