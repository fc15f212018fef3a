"""Recorded spans become times: of each unit's forward, backward and update, of what lies between, and of copies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
    """

    order: tuple[int, ...]
    forward_s: dict[int, float]
    backward_s: dict[int, float]
    update_s: dict[int, float]
    turn_s: float
    between_s: float
    whole_update_s: float


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
        whole_update_s=_median(step.update_s for step in steps),
    )


class _Sums(NamedTuple):
    """Seconds of one step, by unit."""

    forward: dict[int, float]
    backward: dict[int, float]
    turn: float

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
        return cls({unit: each / num_passes for unit, each in forward.items()}, dict(backward), max(0.0, turn))


def speeds_of(spans: Iterable[Span]) -> Speeds:
    """Return how fast the copies of a run were, by their sizes; what was never copied is free.

    >>> speeds_of([Span(Lane.H2D, "P", 0, 0.0, 0.25, 1000)]).h2d.seconds(2000)
    0.5
    """
    spans = list(spans)
    return Speeds(h2d=_curve(spans, Lane.H2D), d2h=_curve(spans, Lane.D2H))


def _curve(spans: Iterable[Span], lane: Lane) -> Curve:
    by_size: defaultdict[int, list[float]] = defaultdict(list)
    for span in spans:
        if span.lane is lane and span.num_bytes:
            by_size[span.num_bytes].append(span.seconds)
    if not by_size:
        return _FREE
    points, reached = [], 0.0
    for size in sorted(by_size):
        reached = max(reached, statistics.median(by_size[size]))
        points.append((size, reached))
    (size, seconds), (largest, longest) = points[0], points[-1]
    rate = (longest - seconds) / (largest - size) if largest > ALIKE * size else seconds / size
    latency = max(0.0, seconds - rate * size)  # what the smallest copy cost beside its bytes
    if largest == size:
        points.append((2 * size, 2 * seconds))
    return Curve(((0, latency), *points))


def _waited(stalls: Sequence[Span], start_s: float, end_s: float) -> float:
    """Seconds that compute waited in an interval."""
    return sum(max(0.0, min(stall.end_s, end_s) - max(stall.start_s, start_s)) for stall in stalls)


def _medians(sums: Sequence[dict[int, float]]) -> dict[int, float]:
    units = {unit for each in sums for unit in each}
    return {unit: statistics.median(each.get(unit, 0.0) for each in sums) for unit in sorted(units)}


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0
