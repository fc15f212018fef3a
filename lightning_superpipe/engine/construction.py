"""An engine as the options, the device and the partition say."""

from __future__ import annotations

import torch
from torch import nn

from lightning_superpipe.config import Adversary, SuperpipeConfig
from lightning_superpipe.engine.activations import choose_policies
from lightning_superpipe.engine.calls import RootScope
from lightning_superpipe.engine.choices import make_lanes, may_pin
from lightning_superpipe.engine.engine import Engine, Window
from lightning_superpipe.engine.shortage import OutOfDeviceMemory
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.partition import Partition
from lightning_superpipe.planning.disk_tier import FileChoice
from lightning_superpipe.planning.workload import Setting
from lightning_superpipe.tiers import Tier

__all__ = ["make_engine"]


def make_engine(
    root: nn.Module,
    found: Partition,
    start: Setting,
    config: SuperpipeConfig,
    device: torch.device,
    *,
    tier: Tier,
    wire: Wire,
    scope: RootScope | None,
    files: FileChoice,
) -> Engine:
    """Return the engine of a module.

    Args:
        start: the window that it begins with.
        scope: opens the scope of a step around each call of the root, where that is called itself.
        files: how units that lie in files travel, and which do not.

    Raises:
        BudgetError: the device has no room for the slots, or the host for the units; the module is as it was.
    """
    hostile = config.adversary or Adversary(poison=False, shuffle_slots=False)
    seed = hostile.seed if hostile.shuffle_slots else None
    names = [unit.name for unit in found.units]
    try:
        return Engine(
            root,
            [(unit.name, unit.module) for unit in found.units],
            found.anchors,
            Window(start.k, start.k_prime, hostile.poison, seed, start.resident, files.ring, files.in_memory),
            lanes=make_lanes(config, device, hostile),
            tier=tier,
            pin=may_pin(config, device),
            root_scope=scope,
            choices=choose_policies(config.activations, names, micro_batches=config.first_micro_batches),
            micro_batches=config.first_micro_batches,
            wire=wire,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"the device has no room for {start.k + start.resident} slots (k={start.k}, resident={start.resident}): "
            f"{error} Use a smaller k, or mark smaller units (units=...)."
        ) from error
