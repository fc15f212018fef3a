"""Captions for images: a vision tower, a projector and a language model that learn together."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_superpipe.recipes.conversations import Example, encode, encode_prompt
from lightning_superpipe.recipes.digits import read_digits, shifted
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.packing import join_padded, join_prompts
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["IMAGE", "DigitCaptions", "VisionLanguageModel"]

IMAGE = "<|image|>"
"""Stands for one part of an image; token 256, the first after the bytes."""

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class VisionLanguageModel(FineTuning):
    """An architecture of transformers that reads images and writes text, such as ``llava``.

    Training batches hold ``pixel_values``, shape (B, C, H, W), and what :class:`FineTuning` takes; held-out ones hold
    prompts instead, padded on the left, and ``captions``, a text for each.

    Args:
        options: see :class:`FineTuning`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(kind="AutoModelForImageTextToText", added_tokens=[IMAGE], **options)
        self.exact_match = MeanMetric()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write captions and count those that are right to the letter."""
        right = [
            written.strip() == caption.strip()
            for written, caption in zip(self._captions(batch), batch["captions"], strict=True)
        ]
        self.exact_match.update(torch.tensor(right, dtype=torch.float32, device=self.device))
        self.log("val_exact_match", self.exact_match, prog_bar=True, batch_size=len(right))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Return a caption for each image."""
        return self._captions(batch)

    def _captions(self, batch: dict[str, Any]) -> list[str]:
        return self.answers({name: value for name, value in batch.items() if name != "captions"})


class DigitCaptions(L.LightningDataModule):
    """Handwritten digits and what they are: "a handwritten seven". Every fifth is held out.

    Args:
        num_image_tokens: parts that the vision tower makes of an image.
        image_size: pixels of a side; the images have 8 and are enlarged.
        batch_size: images in a step.
        shift: training images move by up to this many pixels.
    """

    def __init__(
        self, *, num_image_tokens: int = 16, image_size: int = 8, batch_size: int = 32, shift: int = 1
    ) -> None:
        super().__init__()
        self._image_size, self._batch_size, self._shift = image_size, batch_size, shift
        self._prompt = IMAGE * num_image_tokens + "\n"

    def setup(self, stage: str) -> None:
        """Read the images and tokenize the captions."""
        self._tokenizer = load_tokenizer(None, [IMAGE])
        self._train = read_digits(image_size=self._image_size, is_held_out=False)
        self._held_out = read_digits(image_size=self._image_size, is_held_out=True)
        records = [{"prompt": self._prompt, "completion": caption(digit)} for digit in range(len(_NAMES))]
        self._examples = [encode(record, "completion", self._tokenizer, "digit") for record in records]
        self._prompt_ids = encode_prompt(records[0], "completion", self._tokenizer, "digit")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return images in random order, shifted, with their captions."""
        return DataLoader(self._train, batch_size=self._batch_size, shuffle=True, collate_fn=self._learned)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out images with prompts, and the captions to compare with."""
        return DataLoader(self._held_out, batch_size=4 * self._batch_size, collate_fn=self._asked)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return held-out images."""
        return self.val_dataloader()

    def _learned(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        examples: list[list[Example]] = [[self._examples[int(digit)]] for _, digit in rows]
        images = shifted(torch.stack([image for image, _ in rows]), self._shift)
        return {"pixel_values": images, **join_padded(examples, pad=self._tokenizer.pad_token_id)}

    def _asked(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        prompts = join_prompts([self._prompt_ids] * len(rows), pad=self._tokenizer.pad_token_id)
        captions = [caption(int(digit)) for _, digit in rows]
        return {"pixel_values": torch.stack([image for image, _ in rows]), **prompts, "captions": captions}


def caption(digit: int) -> str:
    """Return what an image of a digit shows.

    >>> caption(7)
    'a handwritten seven'
    """
    return f"a handwritten {_NAMES[digit]}"
