"""Language modelling from scratch: a causal language model learns source code byte by byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_superpipe.recipes.module import RecipeModule
from lightning_superpipe.recipes.networks import make_network, recompute_activations
from lightning_superpipe.recipes.text import (
    FILE_END,
    Corpus,
    HeldOutWindows,
    RandomWindows,
    read_standard_library,
)
from lightning_superpipe.recipes.tokens import byte_tokenizer

__all__ = ["ByteLanguageModel", "SourceCode"]


class ByteLanguageModel(RecipeModule):
    """A causal language model over bytes, any architecture of transformers.

    Args:
        config: ``model_type`` and options of its configuration; the vocabulary is that of bytes.
        recompute: keep only the input of each block in forward.
        generation: options of ``generate`` for predicting; by default it samples 64 bytes.
        options: ``optimizer``, ``scheduler``, ``save_to``: see :class:`RecipeModule`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        recompute: bool = False,
        generation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        tokens = {"bos_token_id": FILE_END, "eos_token_id": FILE_END, "pad_token_id": FILE_END, "vocab_size": 256}
        net = make_network("AutoModelForCausalLM", config=config, changes=tokens)
        if recompute:
            recompute_activations(net)
        super().__init__(net, byte_tokenizer(), **options)
        self.bits_per_byte = MeanMetric()
        self._generation = dict(generation or {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean nats per byte of a batch, shape (B, context + 1)."""
        loss = self._nats_per_byte(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch of held-out text to the metric."""
        self.bits_per_byte.update(self._nats_per_byte(batch) / math.log(2), weight=len(batch))
        self.log("val_bits", self.bits_per_byte, prog_bar=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[str]:
        """Continue prompts, shape (B, T); the texts returned begin with them."""
        written = self.net.generate(batch, attention_mask=torch.ones_like(batch), **self._generation)
        texts: list[str] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts

    def _nats_per_byte(self, batch: Tensor) -> Tensor:
        logits = self.net(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class SourceCode(L.LightningDataModule):
    """Windows of source code: random ones to learn from, evenly spread ones of held-out files, and a prompt.

    Args:
        context: bytes that a prediction may look back; a window has one more.
        batch_size: windows in a step.
        num_windows: of one epoch.
        num_held_out_windows: to validate on.
        root: a folder of Python files; None takes the standard library of the running Python.
        prompt: what to continue in prediction.
        num_samples: continuations of it.
        seed: of the places of the windows.
    """

    def __init__(
        self,
        *,
        context: int = 128,
        batch_size: int = 2,
        num_windows: int = 2000,
        num_held_out_windows: int = 64,
        root: str | None = None,
        prompt: str = "\ndef ",
        num_samples: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._context, self._batch_size = context, batch_size
        self._num_windows, self._num_held_out = num_windows, num_held_out_windows
        self._root, self._seed = root, seed
        self._prompt, self._num_samples = prompt, num_samples
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """The text, read once.

        Raises:
            SuperpipeError: there is hardly any source.
        """
        if self._corpus is None:
            self._corpus = read_standard_library(None if self._root is None else Path(self._root))
        return self._corpus

    def setup(self, stage: str) -> None:
        """Read the text before anything runs; a prompt alone needs none."""
        if stage != "predict":
            assert self.corpus

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return random windows, the same ones for the same seed."""
        windows = RandomWindows(self.corpus.train, self._num_windows, self._context + 1, seed=self._seed)
        return DataLoader(windows, batch_size=self._batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return windows of held-out files."""
        windows = HeldOutWindows(self.corpus.held_out, self._num_held_out, self._context + 1)
        return DataLoader(windows, batch_size=16)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the prompt, once for each sample."""
        prompts = torch.tensor([list(self._prompt.encode())] * self._num_samples)
        return DataLoader(prompts, batch_size=self._num_samples)  # type: ignore[arg-type]
