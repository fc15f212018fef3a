"""Captions for images: a vision tower, a projector and a language model that learn together."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from lightning_superpipe.recipes.conversations import encode, encode_prompt
from lightning_superpipe.recipes.digits import read_digits
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.images import ImageRow, LabelledImages, shifted
from lightning_superpipe.recipes.packing import join_padded, join_prompts
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["IMAGE", "CaptionedImages", "DigitCaptions", "VisionLanguageModel"]

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


class CaptionedImages(LabelledImages):
    """Images with captions.

    Args:
        source: see :func:`read_images`.
        num_image_tokens: parts that the vision tower makes of an image.
        caption: field of the records.
        prompt: what stands between image and caption.
        tokenizer: folder or hub name of the model; None is one token for each byte.
        image_token: stands for one part of an image.
        options: see :class:`LabelledImages`.
    """

    def __init__(
        self,
        source: str,
        *,
        num_image_tokens: int,
        caption: str = "text",
        prompt: str = "\n",
        tokenizer: str | None = None,
        image_token: str = IMAGE,
        **options: Any,
    ) -> None:
        super().__init__(source, label=caption, **options)
        self._prompt, self._tokenizer_name = image_token * num_image_tokens + prompt, tokenizer

    def setup(self, stage: str) -> None:
        """Open the images and tokenize the prompt before anything runs."""
        super().setup(stage)
        self._tokenizer = load_tokenizer(self._tokenizer_name, [IMAGE])
        self._prompt_ids = encode_prompt({"prompt": self._prompt}, "completion", self._tokenizer, "the prompt")

    def caption_of(self, target: Any) -> str:
        """Return the caption of an image by what its record says."""
        return str(target)

    def _learned(self, rows: list[ImageRow]) -> dict[str, Any]:
        records = [{"prompt": self._prompt, "completion": self.caption_of(target)} for _, target in rows]
        examples = [[encode(record, "completion", self._tokenizer, "a caption")] for record in records]
        images = shifted(torch.stack([image for image, _ in rows]), self._shift)
        return {"pixel_values": images, **join_padded(examples, pad=self._tokenizer.pad_token_id)}

    def _asked(self, rows: list[ImageRow]) -> dict[str, Any]:
        prompts = join_prompts([self._prompt_ids] * len(rows), pad=self._tokenizer.pad_token_id)
        captions = [self.caption_of(target) for _, target in rows]
        return {"pixel_values": torch.stack([image for image, _ in rows]), **prompts, "captions": captions}


class DigitCaptions(CaptionedImages):
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
        super().__init__("scikit-learn's digits", num_image_tokens=num_image_tokens, batch_size=batch_size, shift=shift)
        self._image_size = image_size

    def _read(self) -> tuple[Dataset[ImageRow], Dataset[ImageRow]]:
        return read_digits(self._image_size, is_held_out=False), read_digits(self._image_size, is_held_out=True)

    def caption_of(self, target: Any) -> str:
        """Return what an image of a digit shows."""
        return f"a handwritten {_NAMES[int(target)]}"
