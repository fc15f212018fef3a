"""The YAML says what the dataclass says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_superpipe.config import Adversary, Disk, Link, SuperpipeConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = CONFIGS / "superpipe" / "default.yaml"
EVERY_YAML = sorted(CONFIGS.rglob("*.yaml"))
MAX_YAML_LINES = 40


def default_options() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(DEFAULT.read_text())
    assert loaded.pop("_target_") == "lightning_superpipe.SuperpipeStrategy"
    return loaded


def test_default_yaml_holds_every_option_in_order_with_its_default() -> None:
    loaded = default_options()
    assert list(loaded.items()) == [(field.name, field.default) for field in dataclasses.fields(SuperpipeConfig)]


def test_default_yaml_builds_the_default_config() -> None:
    assert SuperpipeConfig.from_options(**default_options()) == SuperpipeConfig()


@pytest.mark.parametrize("nested", [Disk, Link, Adversary])
def test_default_yaml_names_every_option_of_a_nested_group(nested: type) -> None:
    text = DEFAULT.read_text()
    assert [field.name for field in dataclasses.fields(nested) if f"{field.name}:" not in text] == []


@pytest.mark.parametrize("path", EVERY_YAML, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_decision_has_its_meaning_beside_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_YAML_LINES
    assert [line for line in lines if line.strip() and "#" not in line] == []
