"""Images that every machine with scikit-learn has: 1797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import require

__all__ = ["NUM_DIGITS", "DigitImages", "read_digits", "shifted"]

NUM_DIGITS = 10
_SIDE = 8  # pixels
_HELD_OUT = 5  # every fifth image


def read_digits(*, image_size: int, is_held_out: bool) -> TensorDataset:
    """Return images, shape (N, 1, image_size, image_size) between -1 and 1, and their digits, shape (N,)."""
    digits = require("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / _SIDE - 1  # pixels are 0 to 16
    chosen = (torch.arange(len(images)) % _HELD_OUT == 0) == is_held_out
    images, labels = images[chosen], torch.tensor(digits.target)[chosen]
    if image_size != _SIDE:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear")
    return TensorDataset(images, labels)


def shifted(images: Tensor, most: int) -> Tensor:
    """Return images, shape (B, C, H, W), each moved by up to so many pixels; the background fills in."""
    if most == 0:
        return images
    _, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, value=-1.0)
    places = torch.randint(2 * most + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)])


class DigitImages(L.LightningDataModule):
    """Handwritten digits to classify; every fifth is held out.

    Batches hold ``pixel_values``, shape (B, 1, image_size, image_size), and ``labels``, shape (B,).

    Args:
        image_size: pixels of a side; the images have 8 and are enlarged.
        batch_size: images in a step.
        shift: training images move by up to this many pixels.
    """

    def __init__(self, *, image_size: int = 8, batch_size: int = 32, shift: int = 1) -> None:
        super().__init__()
        if image_size < _SIDE:
            raise ConfigError(
                f"image_size={image_size}: the digits have {_SIDE} pixels a side and can only be enlarged."
            )
        self._image_size, self._batch_size, self._shift = image_size, batch_size, shift

    def setup(self, stage: str) -> None:
        """Read the images before anything runs."""
        self._train = read_digits(image_size=self._image_size, is_held_out=False)
        self._held_out = read_digits(image_size=self._image_size, is_held_out=True)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return images in random order, shifted."""
        return DataLoader(self._train, batch_size=self._batch_size, shuffle=True, collate_fn=self._shifted_batch)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out images."""
        return DataLoader(self._held_out, batch_size=4 * self._batch_size, collate_fn=_batch)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return held-out images."""
        return self.val_dataloader()

    def _shifted_batch(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        batch = _batch(rows)
        return batch | {"pixel_values": shifted(batch["pixel_values"], self._shift)}


def _batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}
