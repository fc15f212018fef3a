"""Recorded spans become times: of each unit's forward, backward and update, of what lies between, and of copies."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lightning_superpipe.observe.disk_times import disk_seconds
from lightning_superpipe.observe.trace import Lane, Span
from lightning_superpipe.planning.workload import ALIKE, Curve, Speeds

__all__ = ["StepMark", "UnitTimes", "speeds_of", "unit_times"]

_FORWARD, _BACKWARD = "F", "B"
_FREE = Curve(((0, 0.0), (1, 0.0)))


class StepMark(NamedTuple):
    """When one step was where, on the recorder's clock.

    Attributes:
        begin_s: it began.
        home_s: its gradients were home; where nothing is trained, its last forward had ended.
        update_s: the optimizer had the caller's thread for so long after that.
        is_next: the step after it followed at once, without validation or a checkpoint in between.
    """

    begin_s: float
    home_s: float
    update_s: float = 0.0
    is_next: bool = True


@dataclass(frozen=True)
class UnitTimes:
    """Medians over steps, in seconds; by unit's index. Time that compute waited for copies is not part of any.

    Attributes:
        order: units by their first forward.
        forward_s: from the start of a unit's forward to the next one's.
        backward_s: likewise; what a unit recomputes is part of it.
        update_s: in the thread that updates.
        turn_s: from the last forward to the first backward.
        between_s: from gradients at home to the next forward, without what the optimizer does on the caller's thread.
        whole_update_s: that.
        num_passes: forwards of the whole model in one step without training, such as a ``generate``.
    """

    order: tuple[int, ...]
    forward_s: dict[int, float]
    backward_s: dict[int, float]
    update_s: dict[int, float]
    turn_s: float
    between_s: float
    whole_update_s: float
    num_passes: int = 1


def unit_times(spans: Iterable[Span], steps: Sequence[StepMark]) -> UnitTimes:
    """Return the times of units over some steps, of which all compute was recorded.

    >>> spans = [Span(Lane.COMPUTE, "F", 0, 0.0, 1.0), Span(Lane.COMPUTE, "B", 0, 1.5, 3.5)]
    >>> times = unit_times(spans, [StepMark(0.0, 4.0)])
    >>> times.forward_s, times.turn_s, times.backward_s
    ({0: 1.0}, 0.5, {0: 2.0})
    """
    spans = sorted(spans, key=lambda span: span.start_s)
    stalls = [span for span in spans if span.is_stall]
    uses = [span for span in spans if span.lane is Lane.COMPUTE and span.name in (_FORWARD, _BACKWARD)]
    of_step = [[use for use in uses if step.begin_s <= use.start_s <= step.home_s] for step in steps]
    sums = [_Sums.of(each, stalls) for each in of_step if each]
    between = [
        last.home_s + _waited(stalls, last.home_s, following[0].start_s) + last.update_s
        for (last, _), (_, following) in pairwise(zip(steps, of_step, strict=True))
        if last.is_next and following
    ]
    starts = [
        following[0].start_s
        for (last, _), (_, following) in pairwise(zip(steps, of_step, strict=True))
        if last.is_next and following
    ]
    updates: defaultdict[int, list[float]] = defaultdict(list)
    for span in spans:
        if span.lane is Lane.HOST and span.name == "U":
            updates[span.unit].append(span.seconds)
    return UnitTimes(
        order=tuple(dict.fromkeys(use.unit for each in of_step[-1:] for use in each if use.name == _FORWARD)),
        forward_s=_medians([each.forward for each in sums]),
        backward_s=_medians([each.backward for each in sums]),
        update_s={unit: statistics.median(each) * len(each) / len(steps) for unit, each in updates.items()},
        turn_s=_median(each.turn for each in sums),
        between_s=max(0.0, _median(start - end for start, end in zip(starts, between, strict=True))),
        whole_update_s=_spread([step.update_s for step in steps]),
        num_passes=round(_median(each.num_passes for each in sums)) if sums else 1,
    )


class _Sums(NamedTuple):
    """Seconds of one step, by unit."""

    forward: dict[int, float]
    backward: dict[int, float]
    turn: float
    num_passes: int

    @classmethod
    def of(cls, uses: Sequence[Span], stalls: Sequence[Span]) -> _Sums:
        forward: defaultdict[int, float] = defaultdict(float)
        backward: defaultdict[int, float] = defaultdict(float)
        turn = 0.0
        for use, following in zip(uses, [*uses[1:], None], strict=True):
            turns = following is not None and (use.name, following.name) == (_FORWARD, _BACKWARD)
            end_s = use.end_s if following is None or turns else following.start_s
            seconds = end_s - use.start_s - _waited(stalls, use.start_s, end_s)
            (forward if use.name == _FORWARD else backward)[use.unit] += max(0.0, seconds)
            if following is not None and turns:
                turn += following.start_s - use.end_s - _waited(stalls, use.end_s, following.start_s)
        num_passes = 1
        if not backward:  # one step of evaluation may run the model many times
            num_passes = max(sum(use.unit == unit for use in uses) for unit in forward)
        return cls(
            {unit: each / num_passes for unit, each in forward.items()}, dict(backward), max(0.0, turn), num_passes
        )


def speeds_of(spans: Iterable[Span], machine: Speeds | None = None) -> Speeds:
    """Return how fast the copies of a run were, by their sizes; what was never copied is free. Likewise its files.

    Args:
        spans: of the run.
        machine: what was measured of the machine before. It tells what a run does not see: how both ways disturb each
            other, and sizes that are not copied yet, as much slower or faster as the run's own copies are. Only copies
            that nothing disturbed count then, as far as there are some. Of files it counts where the run has none.

    >>> speeds_of([Span(Lane.H2D, "P", 0, 0.0, 0.25, 1000)]).h2d.seconds(2000)
    0.5
    """
    spans = list(spans)
    copies = [span for span in spans if span.num_bytes and span.lane in (Lane.H2D, Lane.D2H)]
    of_disk = disk_seconds(spans)
    read, write = of_disk[Lane.READ], of_disk[Lane.WRITE]
    if machine is None:
        return Speeds(
            h2d=_curve(_seen(copies, Lane.H2D)),
            d2h=_curve(_seen(copies, Lane.D2H)),
            disk_read=_curve(read) if read else None,
            disk_write=_curve(write) if write else None,
        )
    return Speeds(
        h2d=_completed(_seen(copies, Lane.H2D, alone=machine.both is not None), machine.h2d),
        d2h=_completed(_seen(copies, Lane.D2H, alone=machine.both is not None), machine.d2h),
        both=machine.both,
        disk_read=_curve(read) if read else machine.disk_read,
        disk_write=_curve(write) if write else machine.disk_write,
    )


def _seen(copies: Sequence[Span], lane: Lane, *, alone: bool = False) -> dict[int, float]:
    """Median seconds by size; of copies that ran alone, where there are some of that size."""
    others = sorted((span.start_s, span.end_s) for span in copies if span.lane is not lane) if alone else []
    starts = [start_s for start_s, _ in others]
    by_size: defaultdict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for span in copies:
        if span.lane is lane:
            before = bisect_left(starts, span.end_s)  # each lane copies one after the other, so ends ascend as well
            is_alone = before == 0 or others[before - 1][1] <= span.start_s
            by_size[span.num_bytes][is_alone].append(span.seconds)
    return {size: statistics.median(clear or disturbed) for size, (disturbed, clear) in sorted(by_size.items())}


def _curve(seen: Mapping[int, float]) -> Curve:
    if not seen:
        return _FREE
    points, reached = [], 0.0
    for size, seconds in seen.items():
        reached = max(reached, seconds)
        points.append((size, reached))
    (size, seconds), (largest, longest) = points[0], points[-1]
    rate = (longest - seconds) / (largest - size) if largest > ALIKE * size else seconds / size
    latency = max(0.0, seconds - rate * size)  # what the smallest copy cost beside its bytes
    if largest == size:
        points.append((2 * size, 2 * seconds))
    return Curve(((0, latency), *points))


def _completed(seen: Mapping[int, float], machine: Curve) -> Curve:
    """What was seen, and between and beyond it the machine's curve, as far off as at the nearest size that was seen."""
    if not seen:
        return machine
    points: dict[int, float] = dict(seen)
    for size, seconds in machine.points:
        nearest = min(seen, key=lambda each: abs(math.log(each / max(size, 1))))
        if not 0.5 < max(size, 1) / nearest < 2:
            points[size] = seconds * seen[nearest] / max(machine.seconds(nearest), 1e-12)
    reached, ascending = 0.0, []
    for size in sorted(points):
        reached = max(reached, points[size])
        ascending.append((size, reached))
    return Curve(tuple(ascending))


def _waited(stalls: Sequence[Span], start_s: float, end_s: float) -> float:
    """Seconds that compute waited in an interval."""
    return sum(max(0.0, min(stall.end_s, end_s) - max(stall.start_s, start_s)) for stall in stalls)


def _medians(sums: Sequence[dict[int, float]]) -> dict[int, float]:
    units = {unit for each in sums for unit in each}
    return {unit: statistics.median(each.get(unit, 0.0) for each in sums) for unit in sorted(units)}


def _spread(seconds: Sequence[float]) -> float:
    """Median of what takes time at all, spread over all steps: gradients may accumulate."""
    taken = [each for each in seconds if each]
    return _median(taken) * len(taken) / max(len(seconds), 1)


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0
