"""Images that every machine with scikit-learn has: 1797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import require
from lightning_superpipe.recipes.images import BLACK, ImageRow, LabelledImages

__all__ = ["DigitImages", "read_digits"]

_SIDE = 8  # pixels
_HELD_OUT = 5  # every fifth image


def read_digits(image_size: int, *, is_held_out: bool) -> Dataset[ImageRow]:
    """Return images, shape (1, image_size, image_size) between -1 and 1, and their digits; every fifth is held out.

    Raises:
        ConfigError: the images would have to be made smaller.
    """
    if image_size < _SIDE:
        raise ConfigError(f"image_size={image_size}: the digits have {_SIDE} pixels a side and can only be enlarged.")
    digits = require("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 + BLACK  # pixels are 0 to 16
    chosen = (torch.arange(len(images)) % _HELD_OUT == 0) == is_held_out
    images, labels = images[chosen], torch.tensor(digits.target)[chosen]
    if image_size != _SIDE:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear")
    return TensorDataset(images, labels)  # type: ignore[return-value]


class DigitImages(LabelledImages):
    """Handwritten digits to classify.

    Args:
        image_size: pixels of a side; the images have 8 and are enlarged.
        batch_size: images in a step.
        shift: training images move by up to this many pixels.
    """

    def __init__(self, *, image_size: int = 8, batch_size: int = 32, shift: int = 1) -> None:
        super().__init__("scikit-learn's digits", image_size=image_size, batch_size=batch_size, shift=shift)
        self._image_size = image_size

    def _read(self) -> tuple[Dataset[ImageRow], Dataset[ImageRow]]:
        return read_digits(self._image_size, is_held_out=False), read_digits(self._image_size, is_held_out=True)
