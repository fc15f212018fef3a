"""Data for supervised fine-tuning: chats or completions, one in a row or packed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.conversations import MASKED, Example, encode, encode_prompt, kind_of
from lightning_superpipe.recipes.docstrings import PACKAGES, write_chats
from lightning_superpipe.recipes.packing import Row, join_packed, join_padded, join_prompts, pack
from lightning_superpipe.recipes.records import read_records
from lightning_superpipe.recipes.split import Sources
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["DocstringChats", "Instructions"]


class _Record(NamedTuple):
    """One record, its kind, and what to call it in errors."""

    record: Mapping[str, Any]
    kind: str
    where: str


class Instructions(L.LightningDataModule):
    """Chats (``messages``) or completions (``prompt``, ``completion``) from a file, a saved data set, or the hub.

    Everything is read, checked and tokenized in ``setup``, before anything trains, and kept in memory.

    Args:
        train: see :func:`read_records`.
        held_out: likewise; None holds a share of ``train`` out.
        held_out_share: of the records.
        split, held_out_split: of data sets that have several.
        tokenizer: folder or hub name of the model; None is one token for each byte.
        max_length: tokens in a row; longer examples are cut, and left out if nothing to learn remains.
        packing: fill rows with several examples that do not see each other, instead of padding.
        batch_size: rows in a step.
        num_prompts: held-out prompts to answer in prediction; None answers all.
        cache_dir: where ``datasets`` keeps its copy; None is its own place.
        seed: of what is held out, and of the order of training.
    """

    def __init__(
        self,
        train: str,
        *,
        held_out: str | None = None,
        held_out_share: float = 0.05,
        split: str = "train",
        held_out_split: str = "train",
        tokenizer: str | None = None,
        max_length: int = 1024,
        packing: bool = False,
        batch_size: int = 4,
        num_prompts: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise ConfigError(f"max_length={max_length}: a row needs at least 2 tokens, one to learn from another.")
        self._sources = Sources(train, held_out, held_out_share, split, held_out_split, seed)
        self._cache_dir = cache_dir
        self._tokenizer_name, self._max_length, self._batch_size = tokenizer, max_length, batch_size
        self._num_prompts = num_prompts
        self.is_packed = packing
        self._train: list[Row] = []
        self._held_out: list[Row] = []
        self._prompts: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Read and tokenize what this stage needs.

        Raises:
            ConfigError: a source is missing, empty or corrupt, or a record lacks what is needed.
        """
        self._tokenizer = load_tokenizer(self._tokenizer_name)
        train, held_out = self._sources.read(functools.partial(_numbered, cache_dir=self._cache_dir))
        if stage == "fit":
            self._train = self._rows(train)
        if stage == "predict":
            asked = held_out[: self._num_prompts]
            self._prompts = [encode_prompt(*record[:2], self._tokenizer, record.where) for record in asked]
        else:
            self._held_out = self._rows(held_out)

    def _rows(self, records: list[_Record]) -> list[Row]:
        """Return tokenized rows."""
        examples = [encode(*record[:2], self._tokenizer, record.where) for record in records]
        num_long = sum(len(example.input_ids) > self._max_length for example in examples)
        cut = [Example(*(part[: self._max_length] for part in example)) for example in examples]
        useful = [example for example in cut if (example.labels[1:] != MASKED).any()]
        if num_long:
            rank_zero_info(
                f"{num_long} of {len(examples)} records are longer than max_length={self._max_length} and were cut; "
                f"{len(examples) - len(useful)} had nothing to learn left and were left out."
            )
        if not useful:
            raise ConfigError(
                f"{records[0].where} and the other {len(examples) - 1}: none has anything to learn within "
                f"max_length={self._max_length} tokens. Allow more."
            )
        if not self.is_packed:
            return [[example] for example in useful]
        packed = pack([len(example.input_ids) for example in useful], self._max_length)
        return [[useful[index] for index in row] for row in packed]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return rows in random order."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out rows."""
        return self._loader(self._held_out, shuffle=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return prompts of held-out records."""
        join = functools.partial(join_prompts, pad=self._tokenizer.pad_token_id)
        return _loader(self._prompts, self._batch_size, join)

    def _loader(self, rows: list[Row], *, shuffle: bool) -> DataLoader[Any]:
        join = functools.partial(join_packed if self.is_packed else join_padded, pad=self._tokenizer.pad_token_id)
        return _loader(rows, self._batch_size, join, shuffle=shuffle)


class DocstringChats(Instructions):
    """Questions about functions of the standard library and what their docstrings say, written as JSON lines.

    Args:
        folder: where the files go.
        packages: whose functions.
        options: all of :class:`Instructions` but the sources.
    """

    def __init__(self, folder: str, *, packages: Sequence[str] = PACKAGES, **options: Any) -> None:
        self._folder, self._packages = Path(folder), packages
        super().__init__(str(self._folder / "train.jsonl"), held_out=str(self._folder / "held_out.jsonl"), **options)

    def prepare_data(self) -> None:
        """Write the files."""
        write_chats(self._folder, self._packages)


def _loader(rows: list[Any], batch_size: int, join: Callable[[Any], Any], *, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=join)  # type: ignore[arg-type]


def _numbered(source: str, split: str, cache_dir: str | None) -> list[_Record]:
    """Read a source, and number its records from 1."""
    records = read_records(source, split=split, cache_dir=cache_dir)
    kind = kind_of(records.column_names, source)
    return [_Record(record, kind, f"{source!r}, record {number}") for number, record in enumerate(records, 1)]
