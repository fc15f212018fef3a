"""Every recipe learns the same with and without streaming, to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_superpipe.recipes.classification import ImageClassifier, TextClassifier
from lightning_superpipe.recipes.digits import DigitImages
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.instructions import DocstringChats
from lightning_superpipe.recipes.labelled_texts import DocstringPackages
from lightning_superpipe.recipes.language_model import ByteLanguageModel, SourceCode
from lightning_superpipe.recipes.module import warmup_cosine
from lightning_superpipe.recipes.vision_language import DigitCaptions, VisionLanguageModel
from tests.recipes.runs import (
    ADAMW,
    TINY_GPT2,
    TINY_LLAMA,
    Recipe,
    assert_same_with_and_without_streaming,
    make_trainer,
    streamed,
)

LORA = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}
VIT = {
    "model_type": "vit",
    "image_size": 8,
    "num_channels": 1,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.1,
}
RESNET = {
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 2],
    "layer_type": "basic",
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 256,
    "vision_feature_layer": -1,
    "vision_config": {**VIT, "model_type": "clip_vision_model", "projection_dim": 16},
    "text_config": TINY_LLAMA,
}
GENERATION = {"max_new_tokens": 4, "do_sample": False}


def source_code(folder: Path) -> SourceCode:
    """Windows of a small library; the standard one takes a second to read."""
    for number in range(40):
        (folder / f"module_{number}.py").write_text(f"def function_{number}():\n    return {number}\n" * 1000)
    return SourceCode(context=32, root=str(folder), num_windows=6, num_held_out_windows=2)


def language_model(folder: Path) -> Recipe:
    module = functools.partial(
        ByteLanguageModel,
        TINY_GPT2,
        recompute=True,
        generation=GENERATION,
        optimizer=ADAMW,
        scheduler=functools.partial(warmup_cosine, num_steps=3),
    )
    return Recipe(module, lambda: source_code(folder))


def fine_tuning(folder: Path, *, packing: bool, lora: dict[str, Any] | None = None) -> Recipe:
    module = functools.partial(FineTuning, config=TINY_LLAMA, lora=lora, generation=GENERATION, optimizer=ADAMW)
    data = functools.partial(
        DocstringChats, str(folder), packages=["logging"], max_length=256, packing=packing, batch_size=2,
        num_prompts=2, cache_dir=str(folder),
    )  # fmt: skip
    return Recipe(module, data)


def images(config: dict[str, Any], size: int) -> Recipe:
    module = functools.partial(ImageClassifier, num_classes=10, config=config, optimizer=ADAMW)
    return Recipe(module, lambda: DigitImages(image_size=size, batch_size=4))


def texts(folder: Path) -> Recipe:
    module = functools.partial(TextClassifier, num_classes=2, config=BERT, optimizer=ADAMW)
    return Recipe(module, lambda: DocstringPackages(packages=["http", "logging"], batch_size=4, max_length=32))


def captions(folder: Path) -> Recipe:
    module = functools.partial(VisionLanguageModel, config=LLAVA, generation=GENERATION, optimizer=ADAMW)
    return Recipe(module, lambda: DigitCaptions(num_image_tokens=4, batch_size=4))


RECIPES: dict[str, Callable[[Path], Recipe]] = {
    "language_model": language_model,
    "fine_tuning": functools.partial(fine_tuning, packing=False),
    "fine_tuning_packed": functools.partial(fine_tuning, packing=True),
    "fine_tuning_lora": functools.partial(fine_tuning, packing=True, lora=LORA),
    "image_classification_vit": lambda folder: images(VIT, 8),
    "image_classification_resnet": lambda folder: images(RESNET, 32),
    "text_classification": texts,
    "vision_language": captions,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_the_same_with_and_without_streaming(name: str, tmp_path: Path) -> None:
    outcome = assert_same_with_and_without_streaming(RECIPES[name](tmp_path))
    assert all(torch.isfinite(loss) for loss in outcome.losses)
    assert [name for name in outcome.metrics if name.startswith("val_")]
    assert len(outcome.predictions) == 1


def test_both_towers_of_the_vision_language_model_stream() -> None:
    strategy = streamed()
    recipe = captions(Path())
    make_trainer(strategy).validate(recipe.module(), datamodule=recipe.data(), verbose=False)
    names = [row.name for row in strategy.units if row.role == "unit"]
    for tower in ("vision_tower", "language_model", "projector"):
        assert any(tower in name for name in names), names


def test_lora_trains_adapters_only(tmp_path: Path) -> None:
    module = fine_tuning(tmp_path, packing=False, lora=LORA).module()
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
