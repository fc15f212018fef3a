"""Steps of a simulation, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_superpipe.planning.prediction import HostUse, LaneSeconds, PeakBytes, Prediction

__all__ = ["PlayedStep", "are_repeated", "mean_of"]

_SAME = 1e-9  # relative: two steps that differ less are equal


class PlayedStep(NamedTuple):
    """One step as it was played; the attributes are those of :class:`Prediction`."""

    seconds: float
    busy: LaneSeconds
    stalls_s: tuple[float, ...]
    end_stall_s: float
    num_loads: int
    h2d_bytes: int
    d2h_bytes: int
    peak: PeakBytes
    peak_at: str


def are_repeated(steps: Sequence[PlayedStep], length: int) -> bool:
    """Whether the last so many steps took as long as those before them."""
    pairs = zip(steps[-length:], steps[-2 * length : -length], strict=True)
    return all(abs(new.seconds - old.seconds) <= _SAME * old.seconds for new, old in pairs)


def mean_of(steps: Sequence[PlayedStep], host: HostUse) -> Prediction:
    """Return the mean of steps that repeat, and the largest of their peaks."""
    count = len(steps)
    largest = max(steps, key=lambda step: step.peak.total)
    return Prediction(
        step_s=sum(step.seconds for step in steps) / count,
        busy=LaneSeconds(*(sum(lane) / count for lane in zip(*(step.busy for step in steps), strict=True))),
        stalls_s=tuple(sum(unit) / count for unit in zip(*(step.stalls_s for step in steps), strict=True)),
        end_stall_s=sum(step.end_stall_s for step in steps) / count,
        num_loads=sum(step.num_loads for step in steps) / count,
        h2d_bytes=round(sum(step.h2d_bytes for step in steps) / count),
        d2h_bytes=round(sum(step.d2h_bytes for step in steps) / count),
        peak=largest.peak,
        peak_at=largest.peak_at,
        host=host,
    )
