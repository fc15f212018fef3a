"""Which update stage an engine gets, as the options say."""

from __future__ import annotations

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.stage import UpdateStage

__all__ = ["make_stage"]


def make_stage(engine: Engine, config: SuperpipeConfig, masters: Masters | None) -> UpdateStage | None:
    """Return the stage that splits optimizer steps; None where they stay whole."""
    hostile = config.adversary
    gains_nothing = engine.lanes.shares_memory and hostile is None
    at_once = config.update == "at_once" or (config.update == "auto" and gains_nothing)
    if at_once and masters is None:
        return None
    return UpdateStage(
        engine,
        max_delay_ms=hostile.max_delay_ms if hostile is not None else 0.0,
        seed=hostile.seed if hostile is not None else 0,
        masters=masters,
        in_thread=not at_once,
    )
