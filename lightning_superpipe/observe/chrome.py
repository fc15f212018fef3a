"""A recording as Chrome trace events, which open in Perfetto and chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_superpipe.observe.trace import MemorySample, Recording, Span, rows_of

__all__ = ["chrome_trace"]

_MICROSECONDS = 1e6
_PID = 1

Event = dict[str, Any]


def chrome_trace(recording: Recording) -> dict[str, Any]:
    """Return a JSON-ready trace: a named track per lane, complete events in microseconds, memory as counters.

    A lane gets a further track where its spans overlap, because a viewer drops events that cross on one track. Stalls
    are a category of their own. Times are rounded to nanoseconds.

    Source: the Trace Event Format, events of phase M (names), X (complete) and C (counters).
    """
    events = [_name("process_name", 0, name=f"superpipe step on {recording.device}")]
    events += _lane_events(recording)
    events += [_counter(sample) for sample in recording.samples]
    about = {name: getattr(recording, name) for name in ("k", "k_prime", "device", "emulated")}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**about, **recording.versions}}


def _lane_events(recording: Recording) -> Iterator[Event]:
    """Yield the tracks of all lanes in drawing order, each followed by its spans."""
    track = 0
    for lane in recording.lanes:
        spans = recording.lane(lane)
        rows = rows_of(spans)
        for row in range(max(rows, default=0) + 1):
            track += 1
            yield _name("thread_name", track, name=lane.value if row == 0 else f"{lane.value} ({row + 1})")
            yield _name("thread_sort_index", track, sort_index=track)
            for span, at in zip(spans, rows, strict=True):
                if at == row:
                    yield _complete(span, track, recording.unit_names)


def _complete(span: Span, track: int, unit_names: tuple[str, ...]) -> Event:
    """Return one span; its end is rounded, not its duration, so that neighbours do not cross."""
    start, end = _microseconds(span.start_s), _microseconds(span.end_s)
    known = 0 <= span.unit < len(unit_names)
    return {
        "ph": "X",
        "pid": _PID,
        "tid": track,
        "ts": start,
        "dur": round(end - start, 3),
        "name": f"{span.name}{span.unit}" if known and not span.is_stall else span.name,
        "cat": "stall" if span.is_stall else span.lane.value,
        "args": {"unit": span.unit, "name": unit_names[span.unit] if known else "", "bytes": span.num_bytes},
    }


def _counter(sample: MemorySample) -> Event:
    sizes = sample._asdict()
    time_s = sizes.pop("time_s")
    return {"ph": "C", "pid": _PID, "ts": _microseconds(time_s), "name": "device bytes", "args": sizes}


def _name(what: str, track: int, **args: Any) -> Event:
    return {"ph": "M", "pid": _PID, "tid": track, "name": what, "args": args}


def _microseconds(seconds: float) -> float:
    return round(seconds * _MICROSECONDS, 3)
