"""The smallest batch at which streaming is free: compute on a unit takes as long as its copies, or longer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_superpipe.errors import PlanError
from lightning_superpipe.planning.workload import Speeds, Workload

__all__ = ["FreeBatch", "free_tokens", "smallest_free_batch"]


@dataclass(frozen=True)
class FreeBatch:
    """From how many samples on each kind of copy hides under compute; infinite where nothing computes.

    Attributes:
        forward: loads under the forward.
        backward: loads under the backward, and gradients on their way home beside them.
        update: updates on the host under both.
        tokens_per_sample: 0 where nobody counts them.
        disk: reads and writes of weights and states in files under both; activations are not counted.
    """

    forward: float
    backward: float
    update: float
    tokens_per_sample: float = 0.0
    disk: float = 0.0

    @property
    def samples(self) -> float:
        """Whole samples from which on all of it is hidden."""
        most = max(self.forward, self.backward, self.update, self.disk)
        return most if math.isinf(most) else float(max(1, math.ceil(most - 1e-9)))

    @property
    def tokens(self) -> float:
        """The same in tokens."""
        return self.samples * self.tokens_per_sample


def smallest_free_batch(workload: Workload, speeds: Speeds, *, recompute: bool = False) -> FreeBatch:
    """Return the smallest batch at which a step takes as long as its compute, but for its first load and last gradient.

    Compute grows with the batch, copies of weights and gradients and updates do not. Each unit's copies need not hide
    under its own compute: those of all units together have to.

    Args:
        recompute: units compute their forward again in backward.

    >>> from lightning_superpipe.planning.workload import Curve, UnitWork
    >>> unit = UnitWork("h", weight_bytes=10, gradient_bytes=10, forward_s=0.5, backward_s=1.0, update_s=1.0)
    >>> link = Speeds(h2d=Curve.steady(5.0), d2h=Curve.steady(5.0))
    >>> free = smallest_free_batch(Workload((unit,) * 4, samples=2), link)
    >>> free.forward, free.backward, round(free.update, 6), free.samples
    (8.0, 4.0, 1.333333, 8.0)
    """
    units, samples = workload.units, workload.samples
    forward_s = sum(unit.forward_s for unit in units)
    loads_s = sum(speeds.h2d.seconds(unit.weight_bytes) for unit in units)
    forward = samples * _ratio(loads_s, forward_s)
    if not workload.trains:
        disk = samples * _ratio(sum(speeds.read_s(unit.disk_read_bytes) for unit in units), forward_s)
        return FreeBatch(forward, 0.0, 0.0, workload.tokens / max(samples, 1), disk)
    below = units[workload.lowest :]
    backward_s = sum(unit.backward_s + recompute * unit.forward_s for unit in below)
    copies_s = 0.0
    for unit in below:
        there_s = speeds.h2d.seconds(unit.weight_bytes)
        home_s = speeds.d2h.seconds(unit.gradient_bytes) if unit.gradient_bytes else 0.0
        together_s = max(there_s, home_s)
        if speeds.both is not None and unit.gradient_bytes:
            together_s = max(together_s, speeds.both.seconds(min(unit.weight_bytes, unit.gradient_bytes)))
        copies_s += together_s
    updates_s = sum(unit.update_s for unit in below)
    return FreeBatch(
        forward,
        samples * _ratio(copies_s, backward_s),
        samples * _ratio(updates_s, forward_s + backward_s),
        workload.tokens / max(samples, 1),
        samples * _ratio(_disk_s(workload, speeds), forward_s + backward_s),
    )


def _disk_s(workload: Workload, speeds: Speeds) -> float:
    """Seconds of a training step's reads and writes, as if nothing was in memory still but weights for their update."""
    below = workload.units[workload.lowest :]
    loads_s = sum(speeds.read_s(unit.disk_read_bytes) for unit in (*workload.units, *below))
    return loads_s + sum(map(speeds.file_update_s, below))


def free_tokens(
    flops_per_s: float, bytes_per_parameter: float, link_bytes_per_s: float, *, recompute: bool = False
) -> tuple[float, float]:
    """Return the tokens per residency at which a forward and a backward are free, where nothing was measured yet.

    A forward takes 2 operations per parameter and token, a backward 4, and 6 where it computes the forward again; a
    load takes ``bytes_per_parameter / link_bytes_per_s``. So a forward needs
    ``flops_per_s * bytes_per_parameter / (2 * link_bytes_per_s)``.

    Raises:
        PlanError: a rate that is not positive.

    >>> free_tokens(300e12, 2, 25e9, recompute=True)
    (12000.0, 4000.0)
    """
    if min(flops_per_s, bytes_per_parameter, link_bytes_per_s) <= 0:
        raise PlanError(
            f"flops_per_s={flops_per_s}, bytes_per_parameter={bytes_per_parameter}, "
            f"link_bytes_per_s={link_bytes_per_s}: all three are positive."
        )
    per_operation = flops_per_s * bytes_per_parameter / link_bytes_per_s
    return per_operation / 2, per_operation / (6 if recompute else 4)


def _ratio(copies_s: float, compute_s: float) -> float:
    if not copies_s:
        return 0.0
    return copies_s / compute_s if compute_s > 0 else math.inf
