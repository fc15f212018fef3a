"""How many units are updated on the device: by simulation of what a run's own first steps took."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.observe.kernels import with_kernels
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.optimizer.stage import UpdateStage
from lightning_superpipe.planning.update_share import choose_share

__all__ = ["ShareChoice"]


class ShareChoice:
    """Sets the share that is found, once.

    Args:
        updates: the stage; None where steps stay whole.
        device: where the model computes.
        is_open: the options leave the share open.
        machine: returns what was measured of the machine; None where nothing was.
    """

    def __init__(
        self,
        updates: UpdateStage | None,
        device: torch.device,
        *,
        is_open: bool,
        machine: Callable[[], MachineProfile | None],
    ) -> None:
        self._updates = updates.device if updates is not None and is_open else None
        self._device, self._machine = device, machine

    def settle(self, profile: UnitProfile | None, spare_bytes: int | None) -> None:
        """Choose, if all is known by now.

        Args:
            profile: what was measured under the setting that the run stays with; None while that is open.
            spare_bytes: of the device, which updates there may take; None for no limit.
        """
        updates = self._updates
        if updates is None or profile is None:
            return
        self._updates = None
        if spare_bytes is not None and updates.need_bytes > spare_bytes:
            return
        workload = with_kernels(profile.workload, self._machine(), shares_memory=not is_separate(self._device))
        updates.use_share(choose_share(workload, profile.speeds, profile.setting))
