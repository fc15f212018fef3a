"""How long updates take on the device, as far as that can be told before they have run there."""

from __future__ import annotations

from dataclasses import replace

from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.planning.workload import UnitWork, Workload, updated_on_device

__all__ = ["with_kernels"]


def with_kernels(
    workload: Workload, machine: MachineProfile | None, *, shares_memory: bool, share: float = 0.0
) -> Workload:
    """Return a workload that tells how long each update takes on the device, as far as one was seen on the host.

    A device that is the host itself takes what the host takes. Elsewhere kernels run at the speed of the device's
    memory, or in no time that counts where nobody has measured that.

    Args:
        machine: what was measured of it.
        shares_memory: the device is the host itself.
        share: of the units, that were updated on the device when the workload was measured: nobody saw these on the
            host, and they take as long for each byte as the others.
    """
    units = workload.units
    memory = None if machine is None else machine.memory_curve()
    there = updated_on_device(range(len(units)), share)
    seen = [unit for unit in units if unit.update_s]
    s_per_byte = sum(unit.update_s for unit in seen) / max(sum(unit.gradient_bytes for unit in seen), 1)

    def seconds(index: int, unit: UnitWork) -> float | None:
        if not unit.gradient_bytes or not (unit.update_s or index in there):
            return None
        if shares_memory:
            return unit.update_s or s_per_byte * unit.gradient_bytes
        moved = unit.gradient_bytes + 2 * (unit.weight_bytes + unit.state_bytes)
        return 0.0 if memory is None else memory.seconds(moved)

    timed = (replace(unit, update_on_device_s=seconds(index, unit)) for index, unit in enumerate(units))
    return replace(workload, units=tuple(timed))
