"""How many units are updated on the device: by simulation of what a run's own first steps took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.optimizer.stage import UpdateStage
from lightning_superpipe.planning.update_share import choose_share
from lightning_superpipe.planning.workload import UnitWork, Workload

__all__ = ["ShareChoice", "with_kernels"]


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
        workload = with_kernels(profile.workload, self._device, self._machine())
        updates.use_share(choose_share(workload, profile.speeds, profile.setting))


def with_kernels(workload: Workload, device: torch.device, machine: MachineProfile | None) -> Workload:
    """Return a workload that tells how long each update takes on the device, as far as one was seen on the host.

    A device that is the host itself takes what the host takes. Elsewhere kernels run at the speed of the device's
    memory, or in no time that counts where nobody has measured that.
    """
    memory = None if machine is None else machine.memory_curve()

    def seconds(unit: UnitWork) -> float | None:
        if not (unit.gradient_bytes and unit.update_s):
            return None
        if not is_separate(device):
            return unit.update_s
        moved = unit.gradient_bytes + 2 * (unit.weight_bytes + unit.state_bytes)
        return 0.0 if memory is None else memory.seconds(moved)

    return replace(workload, units=tuple(replace(each, update_on_device_s=seconds(each)) for each in workload.units))
