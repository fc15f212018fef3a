"""The command line in this process, in a folder of its own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_superpipe.app import main as app

CONFIGS = Path(__file__).parent / "configs"


class Ran(NamedTuple):
    """How a command line ended."""

    status: object  # 0, or the words it ended with
    out: str
    folder: Path

    @property
    def all_rows(self) -> list[dict[str, Any]]:
        """Rows of every run of the test."""
        return [json.loads(path.read_text()) for path in sorted(Path.cwd().rglob("rows/*.json"))]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.rglob("rows/*.json"))]


@pytest.fixture
def superpipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], _own_logging: None
) -> Callable[..., Ran]:
    """Run the command line with words of a test; a tiny experiment can be chosen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["superpipe"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*words: str) -> Ran:
        try:
            status: object = app.main(["--config-dir", str(CONFIGS), *words])
        except SystemExit as ended:
            status = ended.code
        folders = [path.parent for path in sorted(tmp_path.rglob("config.yaml")) if path.parent.name != ".hydra"]
        return Ran(status, capsys.readouterr().out, folders[-1] if folders else tmp_path)

    return run


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """Take back how Hydra sets up logging, for the tests that follow."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    disabled = {name: logger.disabled for name, logger in _loggers()}
    yield
    root.handlers[:], root.level = handlers, level
    for name, logger in _loggers():
        logger.disabled = disabled.get(name, False)


def _loggers() -> list[tuple[str, logging.Logger]]:
    known = logging.Logger.manager.loggerDict.items()
    return [(name, logger) for name, logger in known if isinstance(logger, logging.Logger)]
