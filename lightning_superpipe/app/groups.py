"""Where the configuration groups are, and what is in them."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

__all__ = ["GROUPS", "config_path", "group_options"]

GROUPS = {
    "experiment": "a whole recipe: model, data, and what differs from the defaults",
    "superpipe": "what streams and how; off: the ordinary run",
    "model": "a LightningModule",
    "data": "a LightningDataModule",
    "optimizer": "how weights are updated",
    "trainer": "length, validation, clipping",
    "callbacks": "progress bar, checkpoint, metrics of streaming",
    "logger": "where metrics go",
    "machine": "accelerator, precision, workers",
    "sweep": "many jobs: which values, who launches them",
    "debug": "tiny or strict forms of any experiment",
}
"""What there is to choose, by noun."""

_PACKAGE = "lightning_superpipe.configs"
_BESIDE = Path(__file__).resolve().parents[2] / "configs"  # of a checkout that is not installed


def config_path() -> str:
    """Return the place of the groups as Hydra takes it: in the package, or beside it where nothing is installed."""
    return f"pkg://{_PACKAGE}" if _is_installed() else str(_BESIDE)


def group_options(group: str) -> list[str]:
    """Return the names that can be chosen in a group, those of the user's own search path included while Hydra runs."""
    if GlobalHydra.instance().is_initialized():
        return list(GlobalHydra.instance().config_loader().get_group_options(group))
    root = importlib.resources.files(_PACKAGE) if _is_installed() else _BESIDE
    folder = root.joinpath(group)
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _is_installed() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None
