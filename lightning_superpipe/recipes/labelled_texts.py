"""Texts to classify: your own, or docstrings of the standard library by package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.docstrings import PACKAGES, read_docstrings
from lightning_superpipe.recipes.records import read_records
from lightning_superpipe.recipes.split import Sources
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["DocstringPackages", "LabelledText", "LabelledTexts"]


class LabelledText(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


class LabelledTexts(L.LightningDataModule):
    """Texts with the numbers of their classes, from a file, a saved data set, or the hub.

    Batches hold ``input_ids`` and ``attention_mask``, shape (B, T), and ``labels``, shape (B,).

    Args:
        source: see :func:`read_records`.
        held_out: likewise; None holds a share of ``source`` out.
        held_out_share: of the texts.
        text, label: fields of the records.
        split, held_out_split: of data sets that have several.
        tokenizer: folder or hub name of the model; None is one token for each byte.
        max_length: tokens of a text; longer ones are cut.
        batch_size: texts in a step.
        cache_dir: where ``datasets`` keeps its copy; None is its own place.
        seed: of what is held out.
    """

    def __init__(
        self,
        source: str,
        *,
        held_out: str | None = None,
        held_out_share: float = 0.1,
        text: str = "text",
        label: str = "label",
        split: str = "train",
        held_out_split: str = "train",
        tokenizer: str | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._sources = Sources(source, held_out, held_out_share, split, held_out_split, seed)
        self._fields, self._cache_dir = (text, label), cache_dir
        self._tokenizer_name, self._max_length, self._batch_size = tokenizer, max_length, batch_size

    def setup(self, stage: str) -> None:
        """Read the texts before anything runs.

        Raises:
            ConfigError: they cannot be read, or a record lacks what is needed.
        """
        self._tokenizer = load_tokenizer(self._tokenizer_name)
        self._train, self._held_out = self._read()

    def _read(self) -> tuple[list[LabelledText], list[LabelledText]]:
        """Return what to learn from, and what is held out."""
        return self._sources.read(self._texts)

    def _texts(self, source: str, split: str) -> list[LabelledText]:
        records = read_records(source, split=split, cache_dir=self._cache_dir)
        for field in self._fields:
            if field not in records.column_names:
                raise ConfigError(f"{source!r} has no field {field!r}; it has {', '.join(records.column_names)}.")
        texts = [LabelledText(*(record[field] for field in self._fields)) for record in records]
        for number, (text, label) in enumerate(texts, 1):
            if not isinstance(text, str) or not isinstance(label, int):
                raise ConfigError(
                    f"{source!r}, record {number}: {self._fields[0]!r} is {text!r} and {self._fields[1]!r} is "
                    f"{label!r}; a text and the number of its class, from 0, are needed."
                )
        return texts

    def train_dataloader(self) -> DataLoader[Any]:
        """Return texts in random order."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out texts."""
        return self._loader(self._held_out)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return held-out texts."""
        return self.val_dataloader()

    def _loader(self, texts: list[LabelledText], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            texts,  # type: ignore[arg-type]
            batch_size=self._batch_size,
            shuffle=shuffle,
            collate_fn=self._batch,
        )

    def _batch(self, texts: list[LabelledText]) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            [text.text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        labels = torch.tensor([text.label for text in texts])
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


class DocstringPackages(LabelledTexts):
    """Docstrings of the standard library: from which package? A function's own name decides if it is held out.

    Args:
        packages: the classes, in the order of their numbers.
        options: ``tokenizer``, ``max_length`` and ``batch_size`` of :class:`LabelledTexts`.

    Raises:
        ConfigError: there are fewer than two packages.
    """

    def __init__(self, *, packages: Sequence[str] = PACKAGES, **options: Any) -> None:
        if len(packages) < 2:
            raise ConfigError(f"packages={list(packages)}: at least two are needed to tell them apart.")
        super().__init__("the standard library", **options)
        self._packages = list(packages)

    def _read(self) -> tuple[list[LabelledText], list[LabelledText]]:
        parts: tuple[list[LabelledText], list[LabelledText]] = ([], [])
        for docstring in read_docstrings(self._packages):
            number = self._packages.index(docstring.package)
            parts[docstring.is_held_out].append(LabelledText(docstring.summary, number))
        return parts
