"""Text classification on text that every machine has: which package is a docstring from?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.docstrings import PACKAGES, Docstring, read_docstrings
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["DocstringPackages"]


class DocstringPackages(L.LightningDataModule):
    """Docstrings of the standard library, labelled with their package; a text's own name decides if it is held out.

    Batches hold ``input_ids`` and ``attention_mask``, shape (B, T), and ``labels``, shape (B,).

    Args:
        packages: the classes, in the order of their labels.
        tokenizer: folder or hub name of the model; None is one token for each byte.
        max_length: tokens of a text; longer ones are cut.
        batch_size: texts in a step.

    Raises:
        ConfigError: there are fewer than two packages.
    """

    def __init__(
        self,
        *,
        packages: Sequence[str] = PACKAGES,
        tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if len(packages) < 2:
            raise ConfigError(f"packages={list(packages)}: at least two are needed to tell them apart.")
        self._packages, self._tokenizer_name = list(packages), tokenizer
        self._max_length, self._batch_size = max_length, batch_size

    def setup(self, stage: str) -> None:
        """Read the texts before anything runs."""
        self._tokenizer = load_tokenizer(self._tokenizer_name)
        docstrings = read_docstrings(self._packages)
        self._train = [docstring for docstring in docstrings if not docstring.is_held_out]
        self._held_out = [docstring for docstring in docstrings if docstring.is_held_out]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return texts in random order."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out texts."""
        return self._loader(self._held_out)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return held-out texts."""
        return self.val_dataloader()

    def _loader(self, docstrings: list[Docstring], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            docstrings,  # type: ignore[arg-type]
            batch_size=self._batch_size,
            shuffle=shuffle,
            collate_fn=self._batch,
        )

    def _batch(self, docstrings: list[Docstring]) -> dict[str, Tensor]:
        texts = [docstring.summary for docstring in docstrings]
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        labels = torch.tensor([self._packages.index(docstring.package) for docstring in docstrings])
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}
