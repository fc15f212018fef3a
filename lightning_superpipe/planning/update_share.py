"""Which units are updated on the device, and how many: a share that is asked for, or found by a small cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["UpdateCosts", "choose_share", "updated_on_device"]

_WORTH = 0.95  # of the time without: less gain is not worth other last digits


@dataclass(frozen=True)
class UpdateCosts:
    """What the steps of a run take, measured; seconds, and bytes of one unit.

    Attributes:
        num_units: units that are updated.
        compute_s: of one step, all units.
        host_update_s: of one unit.
        weight_bytes: as they cross the link.
        gradient_bytes, state_bytes: as they lie on the host; masters are states.
        h2d_bytes, d2h_bytes: of one step without any update on the device.
        h2d_bytes_s, d2h_bytes_s: of the link, bytes per second.
    """

    num_units: int
    compute_s: float
    host_update_s: float
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    h2d_bytes: float
    d2h_bytes: float
    h2d_bytes_s: float
    d2h_bytes_s: float

    def step_seconds(self, num_on_device: int) -> float:
        """The busiest lane of a step in which so many units are updated on the device.

        Each takes its gradient and states there, weights and states back, and saves the host's time. Kernels of a
        device take none that counts.
        """
        up = num_on_device * (self.weight_bytes + self.gradient_bytes + self.state_bytes)
        down = num_on_device * (self.weight_bytes + self.state_bytes)
        return max(
            self.compute_s,
            (self.h2d_bytes + up) / self.h2d_bytes_s,
            (self.d2h_bytes + down) / self.d2h_bytes_s,
            (self.num_units - num_on_device) * self.host_update_s,
        )


def choose_share(costs: UpdateCosts) -> float:
    """Return the smallest share that makes the busiest lane of a step as short as can be; 0 where it gains under 5 %.

    >>> fast_host = UpdateCosts(10, 1.0, 0.05, 4e6, 4e6, 8e6, 8e7, 4e7, 1e9, 1e9)
    >>> choose_share(fast_host)
    0.0
    >>> from dataclasses import replace
    >>> choose_share(replace(fast_host, host_update_s=0.25)), choose_share(replace(fast_host, host_update_s=10.0))
    (0.6, 1.0)
    """
    best = min(range(costs.num_units + 1), key=costs.step_seconds, default=0)
    gains = costs.step_seconds(best) < _WORTH * costs.step_seconds(0)
    return best / costs.num_units if gains else 0.0


def updated_on_device(first_needed: Sequence[int], share: float) -> frozenset[int]:
    """Return the units that are updated on the device: those which the next forward needs first.

    Backward has used them last, so that some still lie in slots; and nothing hides their update on the host.

    Args:
        first_needed: all units, in the order of the forward.
        share: of all units, 0.0 to 1.0; any share above 0 is one unit at least.

    >>> sorted(updated_on_device([2, 0, 1, 3], 0.5)), sorted(updated_on_device([2, 0, 1, 3], 0.01))
    ([0, 2], [2])
    """
    return frozenset(first_needed[: math.ceil(share * len(first_needed) - 1e-9)])
