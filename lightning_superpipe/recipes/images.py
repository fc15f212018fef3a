"""Images of your own: folders, saved data sets, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import require
from lightning_superpipe.recipes.records import read_records
from lightning_superpipe.recipes.split import Sources

__all__ = ["BLACK", "ImageRow", "LabelledImages", "read_images", "shifted"]

BLACK = -1.0
"""Pixels reach from here to 1."""


class ImageRow(NamedTuple):
    """One image, shape (C, H, W), and what it shows: a class number or a caption."""

    image: Tensor
    target: Any


class _Images(Dataset[ImageRow]):
    """Images decoded when they are asked for."""

    def __init__(self, records: Any, fields: tuple[str, str], image_size: int, num_channels: int) -> None:
        self._records, self._fields = records, fields
        self._image_size, self._num_channels = image_size, num_channels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> ImageRow:
        record = self._records[index]
        image = record[self._fields[0]].convert("L" if self._num_channels == 1 else "RGB")
        pixels = np.asarray(image.resize((self._image_size, self._image_size)), dtype=np.float32)
        tensor = torch.from_numpy(pixels / 127.5 + BLACK).reshape(self._image_size, self._image_size, -1)
        return ImageRow(tensor.permute(2, 0, 1), record[self._fields[1]])


def read_images(
    source: str,
    *,
    target: str,
    image: str = "image",
    split: str = "train",
    cache_dir: str | None = None,
    image_size: int,
    num_channels: int,
) -> Dataset[ImageRow]:
    """Return images between -1 and 1, shape (num_channels, image_size, image_size), with their targets.

    Args:
        source: a folder of images (in a folder for each class, or with a ``metadata.csv``), a folder that
            ``save_to_disk`` wrote, or a hub name.
        target, image: fields of the records.
        split: of a saved or hub data set that has several.
        cache_dir: where ``datasets`` keeps its copy; None is its own place.

    Raises:
        ConfigError: nothing is there, or a field is missing.
    """
    folder = Path(source)
    is_saved = any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    if folder.is_dir() and not is_saved:
        try:
            records = require("datasets").load_dataset("imagefolder", data_dir=source, split=split, cache_dir=cache_dir)
        except Exception as error:  # whatever lies beneath `datasets`
            raise ConfigError(
                f"{source!r} holds no images that can be read ({error}). Give a folder with a folder of images for "
                "each class, or a saved data set."
            ) from error
    else:
        records = read_records(source, split=split, cache_dir=cache_dir)
    for field in (image, target):
        if field not in records.column_names:
            raise ConfigError(f"{source!r} has no field {field!r}; it has {', '.join(records.column_names)}.")
    return _Images(records, (image, target), image_size, num_channels)


def shifted(images: Tensor, most: int) -> Tensor:
    """Return images, shape (B, C, H, W), each moved by up to so many pixels; black fills in."""
    if most == 0:
        return images
    _, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, value=BLACK)
    places = torch.randint(2 * most + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)])


class LabelledImages(L.LightningDataModule):
    """Images to classify.

    Batches hold ``pixel_values``, shape (B, C, image_size, image_size), and ``labels``, shape (B,).

    Args:
        source: see :func:`read_images`.
        held_out: likewise; None holds a share of ``source`` out.
        held_out_share: of the images.
        label, image: fields of the records; a label is the number of a class.
        split, held_out_split: of data sets that have several.
        image_size: pixels of a side.
        num_channels: 1 for grey, 3 for colours.
        batch_size: images in a step.
        shift: training images move by up to this many pixels.
        cache_dir: where ``datasets`` keeps its copy; None is its own place.
        seed: of what is held out.
    """

    def __init__(
        self,
        source: str,
        *,
        held_out: str | None = None,
        held_out_share: float = 0.1,
        label: str = "label",
        image: str = "image",
        split: str = "train",
        held_out_split: str = "train",
        image_size: int = 224,
        num_channels: int = 3,
        batch_size: int = 32,
        shift: int = 0,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._sources = Sources(source, held_out, held_out_share, split, held_out_split, seed)
        self._reading: dict[str, Any] = {"target": label, "image": image, "cache_dir": cache_dir}
        self._reading |= {"image_size": image_size, "num_channels": num_channels}
        self._batch_size, self._shift = batch_size, shift

    def setup(self, stage: str) -> None:
        """Open the images before anything runs.

        Raises:
            ConfigError: they cannot be read.
        """
        self._train, self._held_out = self._read()

    def _read(self) -> tuple[Dataset[ImageRow], Dataset[ImageRow]]:
        """Return what to learn from, and what is held out."""

        def read(source: str, split: str) -> Dataset[ImageRow]:
            return read_images(source, split=split, **self._reading)

        return self._sources.read(read, torch.utils.data.Subset)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return images in random order, shifted."""
        return DataLoader(self._train, batch_size=self._batch_size, shuffle=True, collate_fn=self._learned)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out images."""
        return DataLoader(self._held_out, batch_size=2 * self._batch_size, collate_fn=self._asked)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return held-out images."""
        return self.val_dataloader()

    def _learned(self, rows: list[ImageRow]) -> dict[str, Any]:
        batch = self._asked(rows)
        return batch | {"pixel_values": shifted(batch["pixel_values"], self._shift)}

    def _asked(self, rows: list[ImageRow]) -> dict[str, Any]:
        images, labels = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor([int(label) for label in labels])}
