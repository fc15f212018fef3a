"""Which optimizers are a module's, and which update stage an engine gets, as the options say."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.optimizer.device import DeviceUpdates
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.stage import UpdateStage
from lightning_superpipe.optimizer.stored import StoredUpdates
from lightning_superpipe.planning.disk_tier import FileChoice
from lightning_superpipe.tiers import Tier

__all__ = ["make_stage", "optimizers_of"]


def optimizers_of(root: nn.Module, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Return those optimizers that hold parameters of a module."""
    own = {id(parameter) for parameter in root.parameters()}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    ]


def make_stage(
    engine: Engine, config: SuperpipeConfig, masters: Masters | None, tier: Tier, files: FileChoice
) -> UpdateStage | None:
    """Return the stage that splits optimizer steps; None where they stay whole.

    Args:
        tier: of the session; updates of what it keeps in files are split in any case.
        files: how these travel, and which units do not.
    """
    hostile = config.adversary
    is_stored = not (tier.part("weights").is_memory and tier.part("states").is_memory)
    gains_nothing = engine.lanes.shares_memory and hostile is None and not is_stored
    wants_device = config.update_on_device != 0
    at_once = config.update == "at_once" or (config.update == "auto" and gains_nothing and not wants_device)
    if at_once and masters is None and not is_stored:
        return None
    device = None
    if wants_device:
        share = 0.0 if config.update_on_device == "auto" else float(config.update_on_device)
        poison = hostile is not None and hostile.poison
        device = DeviceUpdates(engine, share, has_masters=masters is not None, poison=poison)
    return UpdateStage(
        engine,
        max_delay_ms=hostile.max_delay_ms if hostile is not None else 0.0,
        seed=hostile.seed if hostile is not None else 0,
        masters=masters,
        in_thread=not at_once,
        device=device,
        stored=StoredUpdates(tier, files, masters, engine.lanes, engine.residency.fetches, engine.invalidate)
        if is_stored
        else None,
    )
