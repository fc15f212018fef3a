"""Users' own texts, images and captions, from files and folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.classification import ImageClassifier, TextClassifier
from lightning_superpipe.recipes.images import LabelledImages
from lightning_superpipe.recipes.labelled_texts import DocstringPackages, LabelledTexts
from lightning_superpipe.recipes.vision_language import CaptionedImages, VisionLanguageModel
from tests.recipes.runs import ADAMW, Recipe, run
from tests.recipes.test_recipes import BERT, GENERATION, LLAVA, VIT
from tests.recipes.test_records import jsonl, message_of


def image_folder(folder: Path) -> str:
    """Three dark images of one class and three bright ones of another."""
    for name, shade in (("dark", 0), ("bright", 255)):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((9, 7), shade, dtype=np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


def test_texts_of_a_file_are_classified(tmp_path: Path) -> None:
    records = [{"body": f"number {number}", "kind": number % 2} for number in range(8)]
    source = jsonl(tmp_path / "a.jsonl", records)
    module = functools.partial(TextClassifier, num_classes=2, config=BERT, optimizer=ADAMW)
    data = functools.partial(
        LabelledTexts, source, text="body", label="kind", batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    assert "val_accuracy" in run(Recipe(module, data)).metrics
    assert "has no field 'text'; it has body, kind" in message_of(
        lambda: LabelledTexts(source, cache_dir=str(tmp_path / "cache")).setup("fit")
    )


def test_a_text_whose_label_is_no_number_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])
    data = LabelledTexts(source, cache_dir=str(tmp_path / "cache"))
    assert "record 1: 'text' is 'a' and 'label' is 'good'" in message_of(lambda: data.setup("fit"))


def test_images_in_a_folder_for_each_class_are_classified(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images")
    data = functools.partial(
        LabelledImages, source, image_size=8, num_channels=1, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    module = functools.partial(ImageClassifier, num_classes=2, config=VIT, optimizer=ADAMW)
    assert "val_accuracy" in run(Recipe(module, data), max_steps=2, val_check_interval=2).metrics
    opened = data(held_out=source)
    opened.setup("fit")
    batch = next(iter(opened.val_dataloader()))
    assert batch["pixel_values"].shape == (4, 1, 8, 8)
    shades = {"bright": 1.0, "dark": -1.0}  # folders in the order of their names
    expected = torch.tensor(list(shades.values()))[batch["labels"]]
    torch.testing.assert_close(batch["pixel_values"].mean((1, 2, 3)), expected)


def test_images_with_captions_are_learned_from_a_saved_set(tmp_path: Path) -> None:
    images = [Image.new("L", (8, 8), shade) for shade in (0, 120, 255)]
    records: dict[str, list[Any]] = {"image": images, "text": ["black", "grey", "white"]}
    datasets.Dataset.from_dict(records, features=datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string")}
    )).save_to_disk(str(tmp_path / "saved"))  # fmt: skip
    module = functools.partial(VisionLanguageModel, config=LLAVA, generation=GENERATION, optimizer=ADAMW)
    data = functools.partial(
        CaptionedImages, str(tmp_path / "saved"), num_image_tokens=4, image_size=8, num_channels=1, batch_size=2
    )
    outcome = run(Recipe(module, data), max_steps=1, val_check_interval=1)
    assert "val_exact_match" in outcome.metrics
    assert "has no field 'title'; it has image, text" in message_of(lambda: data(caption="title").setup("fit"))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    data = LabelledImages(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert "holds no images that can be read" in message_of(lambda: data.setup("fit"))


def test_one_package_cannot_be_told_apart() -> None:
    with pytest.raises(ConfigError, match="at least two are needed"):
        DocstringPackages(packages=["logging"])
