"""Lower bounds on the time of a step, without playing it: a search needs to play few settings then."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_superpipe.planning.need import num_slots
from lightning_superpipe.planning.workload import Setting, Speeds, Workload, updated_there

__all__ = ["StepBounds"]


@dataclass(frozen=True)
class StepBounds:
    """What no step of a workload can beat.

    >>> from lightning_superpipe.planning.workload import Curve, UnitWork
    >>> unit = UnitWork("h", weight_bytes=10, gradient_bytes=10, forward_s=1.0, backward_s=2.0)
    >>> bounds = StepBounds(Workload((unit,) * 4), Speeds(h2d=Curve.steady(10.0), d2h=Curve.steady(10.0)))
    >>> round(bounds.seconds(Setting(k=2)), 6)
    14.0
    """

    workload: Workload
    speeds: Speeds

    @cached_property
    def _load_s(self) -> list[float]:
        return [self.speeds.h2d.seconds(unit.weight_bytes) for unit in self.workload.units]

    @cached_property
    def _gradient_s(self) -> list[float]:
        trained = self._backward_units if self.workload.trains else ()
        units = self.workload.units
        return [self.speeds.d2h.seconds(units[i].gradient_bytes) if units[i].gradient_bytes else 0.0 for i in trained]

    def _update_s(self, there: frozenset[int]) -> float:
        units = self.workload.units
        return sum(units[i].update_s for i in self._backward_units if units[i].gradient_bytes and i not in there)

    @cached_property
    def _backward_units(self) -> range:
        first, n = self.workload.lowest, len(self.workload.units)
        return range(first, n) if self.workload.trains else range(0)

    @cached_property
    def _compute_s(self) -> tuple[float, float]:
        """Forward, and backward with all activations kept; the engine's own time counted."""
        units, use_s = self.workload.units, self.speeds.use_s
        forward = sum(unit.forward_s + use_s for unit in units) + self.workload.between_s
        return forward, sum(units[i].backward_s + use_s for i in self._backward_units)

    def seconds(self, setting: Setting) -> float:
        """Return the bound of one setting, seconds. Cost: one walk over the units that do not keep."""
        workload, (forward_s, backward_s) = self.workload, self._compute_s
        if not workload.trains:
            return forward_s
        n, home_s, disk_s = len(workload.units), sum(self._gradient_s), self._disk_s
        there = updated_there(workload, setting)  # of these none may have to be loaded: slots are updated as well
        there_s, update_s = self._reload_s(setting, there), self._update_s(there)
        if setting.activations:
            for index in self._backward_units:
                policy, unit = setting.activations[index], workload.units[index]
                if policy == "recompute":
                    backward_s += unit.forward_s
                elif policy == "offload" and index < n - 1:
                    home_s += self.speeds.d2h.seconds(unit.offload_bytes)
                    there_s += self.speeds.h2d.seconds(unit.offload_bytes) if index < n - 3 else 0.0
                    disk_s += self._offload_s(unit.offload_bytes, returns=index < n - 3)
        stay = workload.undisturbed
        first_s = 0.0 if stay or 0 in there else self._load_s[0]
        last_s = self._gradient_s[0] if self._gradient_s else 0.0
        between_s = forward_s + workload.turn_s
        serial_s = first_s + between_s + max(backward_s + last_s, sum(self._gradient_s))
        if setting.update == "at_once":
            serial_s += update_s
        loads_s = 0.0
        if not stay and not there:
            loads_s = sum(self._load_s) + workload.turn_s + workload.between_s + backward_s + last_s
        return max(serial_s, loads_s, there_s, home_s, update_s, disk_s)

    @cached_property
    def _disk_s(self) -> float:
        """Reads and writes of all updates, as if their weights were in memory still; loads may need none."""
        units = (self.workload.units[i] for i in self._backward_units)
        return sum(self.speeds.file_update_s(unit) for unit in units if unit.gradient_bytes)

    def _offload_s(self, num_bytes: int, *, returns: bool) -> float:
        """Of one unit's activations, on the disk."""
        if "activations" not in self.workload.in_files:
            return 0.0
        return self.speeds.write_s(num_bytes) + (self.speeds.read_s(num_bytes) if returns else 0.0)

    def _reload_s(self, setting: Setting, there: frozenset[int]) -> float:
        """Copies of weights to the device: all of them, and again those that do not stay over the turn."""
        slots, workload = num_slots(self.workload, setting), self.workload
        backward = sorted(self._load_s[index] for index in self._backward_units)
        again_s = sum(backward[: max(0, len(backward) - slots)])
        if workload.undisturbed:
            trained = (i for i in self._backward_units if workload.units[i].gradient_bytes and i not in there)
            return sum(self._load_s[i] for i in trained)
        return sum(load_s for i, load_s in enumerate(self._load_s) if i not in there) + again_s
