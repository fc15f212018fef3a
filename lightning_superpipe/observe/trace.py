"""What happened in one step: spans on lanes and memory samples, as data that saves and opens in Perfetto."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lightning_superpipe.errors import SuperpipeError

__all__ = ["Lane", "MemorySample", "Recorder", "Recording", "Span", "rows_of", "software_versions"]

_FORMAT = "lightning_superpipe.recording"
_FORMAT_VERSION = 1


class Lane(str, Enum):
    """A stream with a job, in the order in which lanes are drawn."""

    COMPUTE = "compute"  # forward and backward of units, and the time they wait
    H2D = "h2d"  # weights to the device, activations back
    D2H = "d2h"  # gradients and activations home
    HOST = "host"  # optimizer updates
    READ = "read"  # from files into host memory
    WRITE = "write"  # from host memory into files


_OF_FILES = (Lane.READ, Lane.WRITE)


class Span(NamedTuple):
    """One piece of work on one lane.

    Attributes:
        lane: where it ran.
        name: ``"F"``, ``"B"``, ``"P"``, ``"G"``, ``"U"`` as in a plan, ``"A"`` for activations on their way home or
            back, or ``"stall"`` for compute that waits. On the lanes of files, what it was read or written for.
        unit: index of the unit, -1 where there is none.
        start_s: seconds, on the recording's clock.
        end_s: seconds, on the same clock.
        num_bytes: bytes moved; 0 for work that moves none.
    """

    lane: Lane
    name: str
    unit: int
    start_s: float
    end_s: float
    num_bytes: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    @property
    def is_stall(self) -> bool:
        """Whether this is time lost to waiting."""
        return self.name == "stall"


class MemorySample(NamedTuple):
    """Bytes on the device by kind; they hold from ``time_s`` until the next sample."""

    time_s: float
    slots: int
    anchors: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All kinds together, bytes."""
        return self.slots + self.anchors + self.gradients + self.activations


@dataclass(frozen=True)
class Recording:
    """One recorded step.

    Attributes:
        spans: by start time; the earliest moment of the recording is 0 seconds.
        samples: by time, on the same clock.
        unit_names: names of the units; ``Span.unit`` counts into them.
        k: most units on the device at once.
        k_prime: units moved per transfer.
        device: such as ``"cuda:0"``.
        emulated: the link or the device memory was emulated; such numbers never stand beside measured ones.
        resident_bytes: what the ordinary run would hold on the device at least (weights, gradients, states).
        budget_bytes: device bytes the plan may use; None if unlimited.
        versions: of the software that ran, by name.
    """

    spans: tuple[Span, ...]
    samples: tuple[MemorySample, ...]
    unit_names: tuple[str, ...]
    k: int
    k_prime: int
    device: str
    emulated: bool
    resident_bytes: int
    budget_bytes: int | None
    versions: dict[str, str]

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last thing recorded."""
        ends = [span.end_s for span in self.spans] + [sample.time_s for sample in self.samples]
        starts = [span.start_s for span in self.spans] + [sample.time_s for sample in self.samples]
        return max(ends) - min(starts) if ends else 0.0

    @property
    def stall_seconds(self) -> float:
        """Seconds that compute waited."""
        return sum(span.seconds for span in self.spans if span.is_stall)

    @property
    def peak(self) -> MemorySample | None:
        """The sample with the most bytes; None if memory was not sampled."""
        return max(self.samples, key=lambda sample: sample.total, default=None)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes of a step, in drawing order; those of files only where something was read or written."""
        used = {span.lane for span in self.spans}
        return tuple(lane for lane in Lane if lane in used or lane not in _OF_FILES)

    def lane(self, lane: Lane) -> tuple[Span, ...]:
        """Return the spans of one lane, by start time."""
        return tuple(span for span in self.spans if span.lane is lane)

    def busy_seconds(self, lane: Lane) -> float:
        """Return the seconds in which a lane worked: stalls do not count, overlapping spans count once."""
        busy, reached = 0.0, float("-inf")
        for span in sorted((span for span in self.lane(lane) if not span.is_stall), key=_start):
            busy += max(0.0, span.end_s - max(span.start_s, reached))
            reached = max(reached, span.end_s)
        return busy

    def save(self, path: str | Path) -> None:
        """Write the recording as JSON; ``load`` gives back an equal one."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        Path(path).write_text(json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION, **state}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what ``save`` wrote.

        Raises:
            SuperpipeError: the file holds something else.
        """
        try:
            state: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if (state.pop("format"), state.pop("version")) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError("its format or version is another")
            spans = tuple(Span(Lane(lane), *rest) for lane, *rest in state.pop("spans"))
            samples = tuple(MemorySample(*sample) for sample in state.pop("samples"))
            return cls(spans=spans, samples=samples, unit_names=tuple(state.pop("unit_names")), **state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SuperpipeError(
                f"{str(path)!r} is not a recording of this version ({error}). Load a file that Recording.save wrote."
            ) from error

    def to_chrome_trace(self) -> dict[str, Any]:
        """Return the recording as Chrome trace events; dumped as JSON they open in https://ui.perfetto.dev."""
        from lightning_superpipe.observe.chrome import chrome_trace  # it needs the types above

        return chrome_trace(self)


class Recorder:
    """Collects spans and samples of one step from several threads; each call is one list append."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self._spans: list[Span] = []
        self._samples: list[MemorySample] = []

    @staticmethod
    def now() -> float:
        """Return seconds on the clock that spans and samples of one recording share."""
        return time.perf_counter()

    def span(self, lane: Lane, name: str, unit: int, start_s: float, end_s: float, num_bytes: int = 0) -> None:
        """Record one piece of work; the arguments are those of ``Span``."""
        self._spans.append(Span(lane, name, unit, start_s, end_s, num_bytes))

    def sample(self, time_s: float, slots: int, anchors: int, gradients: int, activations: int) -> None:
        """Record the device bytes by kind from ``time_s`` on."""
        self._samples.append(MemorySample(time_s, slots, anchors, gradients, activations))

    def spans(self) -> list[Span]:
        """Return all spans so far, as they came."""
        return list(self._spans)

    def finish(
        self,
        *,
        unit_names: Iterable[str],
        k: int,
        k_prime: int,
        device: str,
        emulated: bool,
        resident_bytes: int,
        budget_bytes: int | None = None,
        versions: dict[str, str] | None = None,
    ) -> Recording:
        """Return all that was recorded, ordered by time and counted from its earliest moment.

        Args are the attributes of ``Recording``; ``versions`` defaults to the installed ones.
        """
        spans, samples = tuple(self._spans), tuple(self._samples)
        starts = [span.start_s for span in spans] + [sample.time_s for sample in samples]
        origin = min(starts, default=0.0)
        moved = (span._replace(start_s=span.start_s - origin, end_s=span.end_s - origin) for span in spans)
        return Recording(
            spans=tuple(sorted(moved, key=lambda span: (span.start_s, span.end_s))),
            samples=tuple(sample._replace(time_s=sample.time_s - origin) for sample in sorted(samples, key=_time)),
            unit_names=tuple(unit_names),
            k=k,
            k_prime=k_prime,
            device=device,
            emulated=emulated,
            resident_bytes=resident_bytes,
            budget_bytes=budget_bytes,
            versions=software_versions() if versions is None else dict(versions),
        )


def rows_of(spans: Sequence[Span], slack_s: float = 0.0) -> list[int]:
    """Return a row for each span, such that spans in one row are apart, or a stall lies within another span.

    Args:
        spans: of one lane, in any order.
        slack_s: overlap that does not count, seconds.

    >>> rows_of([Span(Lane.H2D, "P", unit, start, start + 2.0) for unit, start in enumerate([0.0, 1.0, 2.0])])
    [0, 1, 0]
    """
    rows = [0] * len(spans)
    open_ends: list[list[float]] = []  # per row: ends of the spans around the current moment, innermost last
    for index in sorted(range(len(spans)), key=lambda at: (spans[at].start_s, -spans[at].end_s, spans[at].is_stall)):
        span = spans[index]
        for ends in open_ends:
            while ends and ends[-1] <= span.start_s + slack_s:
                ends.pop()
        fits = (row for row, ends in enumerate(open_ends) if not ends or (span.is_stall and span.end_s <= ends[-1]))
        rows[index] = next(fits, len(open_ends))
        if rows[index] == len(open_ends):
            open_ends.append([])
        open_ends[rows[index]].append(span.end_s)
    return rows


def software_versions() -> dict[str, str]:
    """Return the versions that a recording or a benchmark must name, of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in ("lightning_superpipe", "torch", "lightning", "pytorch_lightning"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _start(span: Span) -> float:
    return span.start_s


def _time(sample: MemorySample) -> float:
    return sample.time_s
