"""Steps of a simulation, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_superpipe.planning.disk_work import DiskWork
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
    disk: DiskWork = DiskWork()


def are_repeated(steps: Sequence[PlayedStep], length: int) -> bool:
    """Whether the last so many steps took as long as those before them."""
    pairs = zip(steps[-length:], steps[-2 * length : -length], strict=True)
    return all(abs(new.seconds - old.seconds) <= _SAME * old.seconds for new, old in pairs)


def mean_of(steps: Sequence[PlayedStep], host: HostUse) -> Prediction:
    """Return the mean of steps that repeat, and the largest of their peaks.

    A disk may fall behind for a few steps before buffers hold the next ones up: in the long run none takes less than
    its work.
    """
    count = len(steps)
    largest = max(steps, key=lambda step: step.peak.total)
    busy = LaneSeconds(*(sum(lane) / count for lane in zip(*(step.busy for step in steps), strict=True)))
    step_s = sum(step.seconds for step in steps) / count
    behind_s = max(0.0, busy.disk - step_s)
    return Prediction(
        step_s=step_s + behind_s,
        busy=busy,
        stalls_s=tuple(sum(unit) / count for unit in zip(*(step.stalls_s for step in steps), strict=True)),
        end_stall_s=sum(step.end_stall_s for step in steps) / count + behind_s,
        num_loads=sum(step.num_loads for step in steps) / count,
        h2d_bytes=round(sum(step.h2d_bytes for step in steps) / count),
        d2h_bytes=round(sum(step.d2h_bytes for step in steps) / count),
        peak=largest.peak,
        peak_at=largest.peak_at,
        host=host,
        disk=DiskWork(
            round(sum(step.disk.read_bytes for step in steps) / count),
            round(sum(step.disk.written_bytes for step in steps) / count),
        ),
    )
