"""How many units are updated on the device, by the cost model and what a run's own first steps took."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.optimizer.stage import UpdateStage
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.update_share import UpdateCosts, choose_share
from lightning_superpipe.planning.workload import Curve

__all__ = ["ShareChoice", "costs_of"]


class ShareChoice:
    """Sets the share that the cost model finds, once.

    Args:
        updates: the stage; None where steps stay whole.
        is_open: the options leave the share open.
    """

    def __init__(self, updates: UpdateStage | None, *, is_open: bool) -> None:
        self._device = updates.device if updates is not None and is_open else None

    def settle(self, profile: UnitProfile | None, spare_bytes: int | None) -> None:
        """Choose, if all is known by now.

        Args:
            profile: what was measured under the setting that the run stays with; None while that is open.
            spare_bytes: of the device, which updates there may take; None for no limit.
        """
        device = self._device
        if device is None or profile is None:
            return
        self._device = None
        costs = costs_of(profile)
        if costs is not None and (spare_bytes is None or device.need_bytes <= spare_bytes):
            device.use_share(choose_share(costs))


def costs_of(profile: UnitProfile) -> UpdateCosts | None:
    """What was measured of one step, as the cost model takes it; None where something was not seen."""
    workload, speeds = profile.workload, profile.speeds
    trained = [unit for unit in workload.units if unit.gradient_bytes and unit.update_s]
    if not trained:
        return None
    without = simulate(workload, speeds, replace(profile.setting, update_on_device=0.0))
    weight_bytes = max(unit.weight_bytes for unit in trained)
    return UpdateCosts(
        num_units=len(trained),
        compute_s=without.busy.compute,
        host_update_s=fmean(unit.update_s for unit in trained),
        weight_bytes=weight_bytes,
        gradient_bytes=max(unit.gradient_bytes for unit in trained),
        state_bytes=max(unit.state_bytes for unit in trained),
        h2d_bytes=without.h2d_bytes,
        d2h_bytes=without.d2h_bytes,
        h2d_bytes_s=_rate(speeds.h2d, weight_bytes),
        d2h_bytes_s=_rate(speeds.d2h, weight_bytes),
    )


def _rate(curve: Curve, num_bytes: int) -> float:
    return num_bytes / max(curve.seconds(num_bytes), 1e-12)
