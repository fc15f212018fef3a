"""Models come from folders that were saved; a folder that holds no model is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_superpipe.errors import ConfigError, SuperpipeError, UnsupportedError
from lightning_superpipe.recipes.classification import ImageClassifier
from lightning_superpipe.recipes.extras import locate, require
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.instructions import Instructions
from lightning_superpipe.recipes.language_model import ByteLanguageModel
from lightning_superpipe.recipes.networks import make_network
from tests.recipes.runs import (
    ADAMW,
    TINY_GPT2,
    TINY_LLAMA,
    Recipe,
    assert_same_with_and_without_streaming,
    make_trainer,
    run,
    streamed,
)
from tests.recipes.test_recipes import RESNET, language_model
from tests.recipes.test_records import RECORDS, jsonl


def saved_model(folder: Path) -> str:
    """A small Llama and its tokenizer, as any other program would have saved them."""
    module = FineTuning(config=TINY_LLAMA)
    module.net.save_pretrained(str(folder))
    module.tokenizer.save_pretrained(str(folder))
    return str(folder)


def additions(tmp_path: Path) -> Instructions:
    source = jsonl(tmp_path / "additions.jsonl", RECORDS)
    return Instructions(source, packing=True, max_length=64, batch_size=2, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["full", "lora"])
def test_fine_tuning_starts_from_a_saved_folder(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    generation = {"max_new_tokens": 3, "do_sample": False}
    module = functools.partial(FineTuning, pretrained=folder, lora=lora, generation=generation, optimizer=ADAMW)
    assert_same_with_and_without_streaming(Recipe(module, lambda: additions(tmp_path)))


def test_what_a_streamed_run_saves_is_what_it_learned(tmp_path: Path) -> None:
    recipe = language_model(tmp_path)
    folder = str(tmp_path / "learned")
    outcome = run(recipe._replace(module=functools.partial(recipe.module, save_to=folder)), streamed())
    loaded = FineTuning(pretrained=folder)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in outcome.weights.items() if name in weights)
    assert len(loaded.tokenizer) == 256
    answers = run(Recipe(lambda: FineTuning(pretrained=folder), lambda: additions(tmp_path)))
    assert len(answers.predictions) == 1


def test_an_adapter_that_was_saved_is_read_again(tmp_path: Path) -> None:
    base, adapter = saved_model(tmp_path / "base"), tmp_path / "adapter"
    module = FineTuning(pretrained=base, lora={"r": 2, "target_modules": ["q_proj"]}, save_to=str(adapter))
    make_trainer(streamed()).fit(module, datamodule=additions(tmp_path))
    assert (adapter / "adapter_model.safetensors").exists()
    again = FineTuning(pretrained=str(adapter)).eval()
    ids = torch.arange(10)[None]
    assert torch.equal(again.net(input_ids=ids).logits, module.eval().net(input_ids=ids).logits)


def test_a_head_of_another_size_starts_afresh(tmp_path: Path) -> None:
    saved = ImageClassifier(num_classes=10, config=RESNET)
    saved.net.save_pretrained(str(tmp_path))
    module = ImageClassifier(num_classes=3, pretrained=str(tmp_path))
    body = {name: value for name, value in saved.state_dict().items() if "classifier" not in name}
    assert all(torch.equal(module.state_dict()[name], value) for name, value in body.items())
    assert module.training  # transformers loads for evaluation
    assert module.net(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 3)


def refusal(**options: Any) -> str:
    with pytest.raises(SuperpipeError) as caught:
        make_network("AutoModelForCausalLM", **options)
    assert "\n\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "holds no weights" in refusal(pretrained=folder)
    assert "it has" in refusal(pretrained=folder)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    assert "cannot be read" in refusal(pretrained=folder)
    (tmp_path / "model" / "config.json").unlink()
    assert "holds no config.json" in refusal(pretrained=folder)
    assert "cannot be read" in refusal(pretrained="nobody/nothing")


def test_exactly_one_source_of_weights_is_allowed() -> None:
    assert "give exactly one" in refusal()
    assert "give exactly one" in refusal(pretrained="a", config=TINY_LLAMA)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 3}, "needs `model_type`"),
        ({"model_type": "lama"}, "'lama'"),
        ({"model_type": "resnet"}, "makes no AutoModelForCausalLM"),
    ],
)
def test_a_configuration_of_no_architecture_is_refused(config: dict[str, Any], words: str) -> None:
    assert words in refusal(config=config)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    module = FineTuning(pretrained=folder)
    module.tokenizer.add_tokens(["<|more|>"])
    module.tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match="has 257 tokens, the model knows 256"):
        FineTuning(pretrained=folder, tokenizer=str(tmp_path / "tokenizer"))


def test_a_lora_of_unknown_layers_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Linear layers of this model: .*q_proj"):
        FineTuning(config=TINY_LLAMA, lora={"r": 2, "target_modules": ["query"]})


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    with pytest.raises(UnsupportedError, match=r"no_such_package.*lightning_superpipe\[recipes\]"):
        require("no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        locate("pkg://no_such_package/model")
    with pytest.raises(ConfigError, match="has no folder 'nothing'"):
        locate("pkg://lightning_superpipe/nothing")


def test_any_causal_architecture_learns_bytes() -> None:
    for config in (TINY_GPT2, TINY_LLAMA):
        module = ByteLanguageModel(config)
        assert module.net.get_output_embeddings().weight.shape[0] == 256
