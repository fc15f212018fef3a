"""The command ``superpipe``: its words, Hydra, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_superpipe.app.explain import explain
from lightning_superpipe.app.groups import config_path
from lightning_superpipe.app.modes import run
from lightning_superpipe.app.words import help_text, overrides_of
from lightning_superpipe.errors import SuperpipeError

__all__ = ["main", "task"]

_FULL_ERROR = "HYDRA_FULL_ERROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Raises:
        SystemExit: with a paragraph, if something cannot be done as asked.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["report"]:
        return _report(words[1:])
    if words[:1] == ["profile"] and not {"--help", "-h"} & set(words):
        return _profile(words[1:])
    if "--help" in words or "-h" in words:
        print(help_text())
        return 0
    if os.environ.get(_FULL_ERROR) == "1":
        _run_hydra(run, overrides_of(words))
        return 0
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises what it would otherwise print
    try:
        _run_hydra(task, overrides_of(words))
    except Exception as error:
        _end(error)
    finally:
        del os.environ[_FULL_ERROR]
        os.environ.update({} if before is None else {_FULL_ERROR: before})
    return 0


def task(config: DictConfig) -> float | None:
    """Run one job; alone, it ends with a paragraph where that is enough."""
    try:
        return run(config)
    except Exception as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # perhaps in a process of the launcher, which must live on
        _end(error)


def _run_hydra(job: Callable[[DictConfig], float | None], overrides: list[str]) -> None:
    sys.argv[1:] = overrides  # the only way in: Hydra reads the command line by itself
    hydra.main(version_base="1.3", config_path=config_path(), config_name="config")(job)()


def _end(error: Exception) -> NoReturn:
    """End with a paragraph where that is enough, else with the error itself."""
    paragraph = explain(error)
    if paragraph is None:
        raise error
    sys.exit(f"superpipe: {paragraph}")


def _report(words: list[str]) -> int:
    """Print and draw the sweep in a folder; return the exit status."""
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: superpipe report FOLDER    (of a sweep, such as multirun/language_model)", file=sys.stderr)
        return 2
    from lightning_superpipe.sweeps.report import print_report  # no other word needs it

    try:
        print_report(words[0])
    except SuperpipeError as error:
        print(f"superpipe: {error}", file=sys.stderr)
        return 1
    return 0


def _profile(words: list[str]) -> int:
    """Measure and print this machine; return the exit status."""
    from lightning_superpipe.app.profile import print_profile  # no other word needs it

    try:
        print_profile(words)
    except SuperpipeError as error:
        print(f"superpipe: {error}", file=sys.stderr)
        return 1
    return 0
