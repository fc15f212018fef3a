"""One run of the application: what was asked, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_superpipe.app.assembly import ordinary_strategy

__all__ = ["Job"]

_ORDINARY = f"{ordinary_strategy.__module__}.{ordinary_strategy.__name__}"


@dataclass(frozen=True)
class Job:
    """One run of the application.

    Attributes:
        config: composed, with everything that was asked.
        folder: what the run writes goes there.
        rows_folder: where its row goes: of the whole sweep, the same as ``folder`` where there is none.
        is_sweep: it is one of many.
    """

    config: DictConfig
    folder: Path
    rows_folder: Path
    is_sweep: bool

    @classmethod
    def current(cls, config: DictConfig) -> Job:
        """Return the job that Hydra is running."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        is_sweep = hydra.mode is RunMode.MULTIRUN
        return cls(
            _without_idle_options(config),
            folder,
            Path(hydra.runtime.cwd, hydra.sweep.dir) if is_sweep else folder,
            is_sweep,
        )

    def plain_config(self) -> dict[str, Any]:
        """Return what was asked as plain values, without the run's own folder: equal for equal jobs."""
        config = self.config.copy()
        config.output_dir, config.memory_cap = ".", None  # of this very run, and of the search alone
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict), "the root of a composed configuration is a mapping"
        return {str(key): value for key, value in plain.items()}

    def save_config(self) -> None:
        """Write what was asked, every interpolation resolved, to ``config.yaml``."""
        text = OmegaConf.to_yaml(self.config, resolve=True)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")


def _without_idle_options(config: DictConfig) -> DictConfig:
    """Return the configuration without options of streaming where nothing streams: such jobs are all the same."""
    if config.superpipe.get("_target_") != _ORDINARY:
        return config
    config = config.copy()
    config.superpipe = {"_target_": _ORDINARY}
    return config
