"""The command ``superpipe``: its words, Hydra, and how it ends."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from lightning_superpipe.app.modes import MODES, run

__all__ = ["main"]

_PACKAGE = "lightning_superpipe.configs"


def config_path() -> str:
    """Return where the configuration groups are: in the package, or beside it where nothing was installed."""
    if importlib.util.find_spec(_PACKAGE) is not None:
        return f"pkg://{_PACKAGE}"
    return str(Path(__file__).resolve().parents[2] / "configs")


def task(config: DictConfig) -> float | None:
    """Run one job; a function of this module, so that launchers can send it to other processes."""
    return run(config)


def main() -> int:
    """Run the command line; return the exit status."""
    sys.argv[1:] = _with_mode(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=config_path(), config_name="config")(task)()
    return 0


def _with_mode(arguments: list[str]) -> list[str]:
    """Return the arguments with the word of a mode written as an override."""
    return [f"mode={argument}" if argument in MODES else argument for argument in arguments]
