"""Every YAML file composes with the others and makes what it says; whoever adds a file has it tested."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig, OmegaConf

from lightning_superpipe import SuperpipeConfig, SuperpipeStrategy
from lightning_superpipe.app.assembly import assemble, build, build_module
from lightning_superpipe.app.groups import GROUPS, config_path, group_options

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NEEDS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # libraries, any of which will do


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def _hydra(tmp_path: Path) -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    """The whole configuration, as the app sees it."""
    try:
        whole = compose("config", [*overrides, f"hydra.runtime.output_dir={tmp_path}"], return_hydra_config=True)
    except MissingConfigException as missing:
        if str(missing.missing_cfg_file).startswith(("hydra/launcher/", "hydra/sweeper/")):
            pytest.skip(f"the plugin for {missing.missing_cfg_file} is not installed")
        raise
    HydraConfig.instance().set_config(whole)
    config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return config


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in missing_keys(value, f"{prefix}.{key}")]
    return [prefix.lstrip(".")] if node == "???" else []


def test_every_group_is_a_folder_and_has_its_line_in_the_help() -> None:
    folders = {path.parent.name for path in CONFIGS.glob("*/*.yaml")}
    assert folders == set(GROUPS)
    assert {group: group_options(group) for group in GROUPS} == {group: options_of(group) for group in GROUPS}


def test_groups_are_found_in_a_checkout_and_in_an_installation() -> None:
    is_installed = importlib.util.find_spec("lightning_superpipe.configs") is not None
    assert config_path() == ("pkg://lightning_superpipe.configs" if is_installed else str(CONFIGS))


@pytest.mark.parametrize("option", options_of("superpipe"))
def test_a_preset_makes_the_strategy_that_users_pass_to_a_trainer(tmp_path: Path, option: str) -> None:
    node = composed(tmp_path, f"superpipe={option}").superpipe
    strategy = instantiate(node)
    L.Trainer(strategy=strategy, logger=False, accelerator="cpu", devices=1, default_root_dir=tmp_path)
    if option == "off":
        assert strategy == "auto"
        return
    assert isinstance(strategy, SuperpipeStrategy)
    told = {key: value for key, value in OmegaConf.to_container(node).items() if key != "_target_"}  # type: ignore[union-attr]
    assert strategy.config == SuperpipeConfig.from_options(**told)


@pytest.mark.parametrize("option", options_of("logger"))
def test_a_logger_is_made(tmp_path: Path, option: str) -> None:
    libraries = NEEDS.get(option, ())
    if libraries and not any(importlib.util.find_spec(library) for library in libraries):
        pytest.skip(f"{' or '.join(libraries)} is not installed")
    overrides = ["logger.wandb.offline=true"] if option == "wandb" else []
    for name, node in (composed(tmp_path, f"logger={option}", *overrides).logger or {}).items():
        assert isinstance(build(node, f"logger.{name}"), L.pytorch.loggers.Logger)


@pytest.mark.parametrize("option", options_of("callbacks"))
def test_callbacks_are_made(tmp_path: Path, option: str) -> None:
    for name, node in composed(tmp_path, f"callbacks={option}").callbacks.items():
        assert node is None or isinstance(build(node, f"callbacks.{name}"), L.Callback)


@pytest.mark.parametrize("option", options_of("optimizer"))
def test_an_optimizer_is_made_from_parameters(tmp_path: Path, option: str) -> None:
    make = build(composed(tmp_path, f"optimizer={option}").optimizer, "optimizer")
    linear = BoringModel().layer
    assert [len(group["params"]) for group in make(linear.parameters()).param_groups] == [2]


@pytest.mark.parametrize("option", options_of("machine"))
@pytest.mark.parametrize("trainer", options_of("trainer"))
def test_a_trainer_is_made_for_each_machine(tmp_path: Path, trainer: str, option: str) -> None:
    config = composed(tmp_path, f"trainer={trainer}", f"machine={option}", "trainer.accelerator=cpu")
    assert config.machine.keys() == composed(tmp_path).machine.keys()
    assert isinstance(build(config.trainer, "trainer", logger=False, default_root_dir=tmp_path), L.Trainer)


@pytest.mark.parametrize("group", ["sweep", "debug"])
@pytest.mark.parametrize("experiment", ["language_model"])
def test_sweeps_and_debug_forms_go_with_an_experiment(tmp_path: Path, group: str, experiment: str) -> None:
    known = composed(tmp_path, f"experiment={experiment}").keys()
    for option in options_of(group):
        try:
            config = composed(tmp_path, f"experiment={experiment}", f"{group}={option}")
        except pytest.skip.Exception:  # a launcher's plugin; the others are still composed
            continue
        assert config.keys() == known
        OmegaConf.to_container(config, resolve=True)
        if group == "debug":
            build(config.trainer, "trainer", logger=False, default_root_dir=tmp_path)
            build(config.superpipe, "superpipe")


@pytest.mark.parametrize("option", options_of("experiment"))
def test_an_experiment_resolves_with_and_without_streaming(tmp_path: Path, option: str) -> None:
    for superpipe in ("default", "off"):
        config = composed(tmp_path, f"experiment={option}", f"superpipe={superpipe}")
        for key in missing_keys(OmegaConf.to_container(config)):  # what only the user can know
            OmegaConf.update(config, key, "given")
        OmegaConf.to_container(config, resolve=True)
        build(config.superpipe, "superpipe")
        assert (config.model._target_, config.data._target_) != (None, None)


@pytest.mark.parametrize("group", ["model", "data"])
def test_every_model_and_data_file_names_a_class_that_exists(tmp_path: Path, group: str) -> None:
    for option in options_of(group):
        target = composed(tmp_path, f"{group}={option}")[group]._target_
        module, _, name = target.rpartition(".")
        kind = L.LightningModule if group == "model" else L.LightningDataModule
        assert issubclass(getattr(importlib.import_module(module), name), kind)


def test_the_recipe_that_needs_nothing_is_assembled_whole(tmp_path: Path) -> None:
    config = composed(tmp_path, "experiment=language_model", "model.config.n_layer=2", "logger=none")
    parts = assemble(config)
    assert isinstance(parts.trainer.strategy, SuperpipeStrategy)
    first, again = (dict(build_module(config).named_parameters()) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
