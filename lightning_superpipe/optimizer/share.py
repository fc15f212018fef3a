"""How many units are updated on the device: by simulation of what a run's own first steps took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.observe.kernels import with_kernels
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.optimizer.stage import UpdateStage
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.update_share import choose_share
from lightning_superpipe.planning.workload import Workload

__all__ = ["ShareChoice"]


class ShareChoice:
    """Sets the share that is found, once.

    Args:
        updates: the stage; None where steps stay whole.
        device: where the model computes.
        is_open: the options leave the share open.
        machine: returns what was measured of the machine; None where nothing was.
        tell: says something to the user.

    Attributes:
        plan: what was told; empty where no unit is updated on the device, or nothing was open.
    """

    def __init__(
        self,
        updates: UpdateStage | None,
        device: torch.device,
        *,
        is_open: bool,
        machine: Callable[[], MachineProfile | None],
        tell: Callable[[str], None],
    ) -> None:
        self._updates = updates.device if updates is not None and is_open else None
        self._device, self._machine, self._tell = device, machine, tell
        self.plan = ""

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
        share = choose_share(workload, profile.speeds, profile.setting)
        updates.use_share(share)
        if share:
            self._say(workload, profile, share)

    def _say(self, workload: Workload, profile: UnitProfile, share: float) -> None:
        settings = (replace(profile.setting, update_on_device=each) for each in (0.0, share))
        before_s, after_s = (simulate(workload, profile.speeds, setting).step_s for setting in settings)
        self.plan = (
            f"update_on_device={share:.2g}: the first {share:.0%} of the units are updated on the device; predicted: "
            f"{1e3 * after_s:.4g} ms a step, {1e3 * before_s:.4g} with all updates on the host"
        )
        self._tell(f"superpipe: {self.plan}.")
