"""Which units are updated on the device, and how many: a share that is asked for, or found by simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Setting, Speeds, Workload

__all__ = ["choose_share"]

_WORTH = 0.95  # of the time without: less gain is not worth other last digits
_TIE = 0.005
_NUM_LEVELS = 9


def choose_share(workload: Workload, speeds: Speeds, setting: Setting) -> float:
    """Return the smallest share under which steps are as short as can be; 0 where it gains under 5 %.

    Args:
        workload: units that may be updated there have ``update_on_device_s``.
        setting: of all other knobs.

    Cost: some twenty simulations.

    >>> from lightning_superpipe.planning.workload import Curve, UnitWork
    >>> unit = UnitWork("h", 4, 4, 8, forward_s=1.0, backward_s=2.0, update_s=9.0, update_on_device_s=0.0)
    >>> link = Speeds(h2d=Curve.steady(8.0), d2h=Curve.steady(8.0))
    >>> choose_share(Workload((unit,) * 8), link, Setting(k=2))
    0.875
    >>> choose_share(Workload((replace(unit, update_s=0.5),) * 8), link, Setting(k=2))
    0.0
    """
    num_units = len(workload.units)
    seconds: dict[int, float] = {}

    def step_s(count: int) -> float:
        if count not in seconds:
            other = replace(setting, update_on_device=count / num_units)
            seconds[count] = simulate(workload, speeds, other).step_s
        return seconds[count]

    step = max(1, num_units // (_NUM_LEVELS - 1))
    best = _smallest_best([*range(0, num_units, step), num_units], step_s)
    while step > 1:
        step //= 2
        near = [count for count in (best - step, best, best + step) if 0 <= count <= num_units]
        best = _smallest_best(near, step_s)
    return best / num_units if step_s(best) < _WORTH * step_s(0) else 0.0


def _smallest_best(counts: Sequence[int], step_s: Callable[[int], float]) -> int:
    """Return the smallest of some ascending counts that is about as fast as any of them."""
    limit_s = min(map(step_s, counts)) * (1 + _TIE)
    return next(count for count in counts if step_s(count) <= limit_s)
