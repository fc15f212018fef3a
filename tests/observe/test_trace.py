from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.trace import Lane, MemorySample, Recorder, Recording, Span, rows_of
from tests.observe.simulated import simulate_step


def finished(recorder: Recorder, num_units: int = 4) -> Recording:
    names = [f"blocks.{unit}" for unit in range(num_units)]
    return recorder.finish(unit_names=names, k=2, k_prime=1, device="cpu", emulated=True, resident_bytes=64)


def complete_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_a_recording_survives_its_file_exactly(tmp_path: Path) -> None:
    rng = random.Random(0)
    recording = replace(
        simulate_step(num_units=5, k=2, budget_bytes=2**40 + 1),
        spans=tuple(Span(rng.choice(list(Lane)), "F", 1, rng.random(), 1 / 3 + 10**unit, unit) for unit in range(20)),
        unit_names=("tête", 'a"b'),
    )
    recording.save(tmp_path / "step.json")
    loaded = Recording.load(tmp_path / "step.json")
    assert loaded == recording
    assert all(isinstance(span, Span) and isinstance(span.lane, Lane) for span in loaded.spans)
    assert all(isinstance(sample, MemorySample) for sample in loaded.samples)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lightning_superpipe.recording", "version": 999}'])
def test_a_file_that_is_no_recording_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SuperpipeError, match=r"other\.json.*not a recording"):
        Recording.load(path)


def test_threads_that_record_at_once_lose_nothing() -> None:
    recorder, start = Recorder(), Barrier(8)

    def record(thread: int) -> None:
        start.wait()
        for at in range(1000):
            recorder.span(Lane.H2D, "P", thread, at, at + 1, num_bytes=thread)
            recorder.sample(at, thread, 0, 0, 0)

    threads = [Thread(target=record, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recording = finished(recorder, num_units=8)
    expected = {(unit, start) for unit in range(8) for start in range(1000)}
    assert (len(recording.spans), len(recording.samples)) == (8000, 8000)
    assert {(span.unit, span.start_s) for span in recording.spans} == expected
    assert all(early.start_s <= late.start_s for early, late in pairwise(recording.spans))


def test_a_recording_begins_at_zero_and_does_not_change_any_more() -> None:
    recorder = Recorder()
    recorder.span(Lane.D2H, "G", 1, 1003.0, 1004.0, 7)
    recorder.span(Lane.COMPUTE, "B", 1, 1001.0, 1003.0)
    recorder.sample(1000.5, 1, 2, 3, 4)
    recording = finished(recorder)
    recorder.span(Lane.HOST, "U", 1, 1004.0, 1005.0)
    assert recording.spans == (Span(Lane.COMPUTE, "B", 1, 0.5, 2.5), Span(Lane.D2H, "G", 1, 2.5, 3.5, 7))
    assert recording.samples == (MemorySample(0.0, 1, 2, 3, 4),)
    assert recording.duration_s == 3.5


def test_nothing_recorded_is_an_empty_recording() -> None:
    recording = finished(Recorder())
    assert (recording.spans, recording.duration_s, recording.stall_seconds, recording.peak) == ((), 0.0, 0.0, None)


def test_busy_time_counts_overlap_once_and_stalls_never() -> None:
    recorder = Recorder()
    for name, start, end in (("P", 0.0, 4.0), ("P", 1.0, 2.0), ("P", 3.0, 5.0), ("F", 6.0, 7.0), ("stall", 7.0, 9.0)):
        recorder.span(Lane.H2D, name, 0, start, end)
    recording = finished(recorder)
    assert recording.busy_seconds(Lane.H2D) == 6.0
    assert recording.busy_seconds(Lane.HOST) == 0.0
    assert recording.stall_seconds == 2.0


def test_the_peak_is_the_sample_with_the_largest_sum() -> None:
    samples = (MemorySample(0.0, 5, 0, 0, 0), MemorySample(1.0, 4, 1, 2, 3), MemorySample(2.0, 4, 1, 3, 1))
    assert replace(simulate_step(), samples=samples).peak == samples[1]


def test_versions_name_what_ran() -> None:
    assert {"python", "torch"} <= set(finished(Recorder()).versions)


@pytest.mark.parametrize("seed", range(20))
def test_spans_in_one_row_are_apart_and_no_row_is_wasted(seed: int) -> None:
    rng = random.Random(seed)
    starts = [rng.randrange(20) for _ in range(12)]
    spans = [Span(Lane.HOST, "U", 0, start, start + rng.randrange(1, 8)) for start in starts]
    rows = rows_of(spans)
    for (one, row), (other, other_row) in combinations(zip(spans, rows, strict=True), 2):
        assert row != other_row or one.end_s <= other.start_s or other.end_s <= one.start_s
    most_at_once = max(sum(span.start_s <= moment < span.end_s for span in spans) for moment in range(30))
    assert max(rows) + 1 == most_at_once


@pytest.mark.parametrize(
    ("stall", "rows"),
    [
        ((0, 2), [0, 0, 0]),  # it waits, then computes
        ((1, 4), [0, 0, 0]),
        ((0, 4), [0, 0, 0]),
        ((3, 5), [1, 0, 0]),  # crosses the end of one span
        ((4, 7), [0, 0, 1]),  # outlasts the other, and so comes first
    ],
)
def test_a_stall_lies_in_the_row_of_the_span_around_it(stall: tuple[int, int], rows: list[int]) -> None:
    times = (("stall", *stall), ("B", 0, 4), ("B", 4, 6))
    assert rows_of([Span(Lane.COMPUTE, name, 0, start, end) for name, start, end in times]) == rows


def test_overlap_within_the_slack_does_not_count() -> None:
    spans = [Span(Lane.D2H, "G", 0, 0.0, 1.0), Span(Lane.D2H, "G", 1, 0.75, 2.0)]
    assert rows_of(spans) == rows_of(spans, slack_s=0.125) == [0, 1]
    assert rows_of(spans, slack_s=0.25) == [0, 0]


def test_chrome_trace_names_the_process_and_one_track_for_each_lane() -> None:
    trace = simulate_step(num_units=3, k=2).to_chrome_trace()
    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    tracks = {event["args"]["name"]: event["tid"] for event in names if event["name"] == "thread_name"}
    assert [event["args"]["name"] for event in names if event["name"] == "process_name"] == ["superpipe step on emu:0"]
    assert list(tracks) == ["compute", "h2d", "d2h", "host"]
    assert {event["tid"] for event in complete_events(trace)} == set(tracks.values())
    assert trace["otherData"] == {"k": 2, "k_prime": 1, "device": "emu:0", "emulated": True, "torch": "2.13.0"}


def test_chrome_trace_holds_every_span_in_microseconds_with_its_unit_and_bytes() -> None:
    recorder = Recorder()
    recorder.span(Lane.H2D, "P", 2, 5.0, 5.0015, num_bytes=640)
    recorder.span(Lane.COMPUTE, "stall", 2, 5.0005, 5.0015)
    trace = json.loads(json.dumps(finished(recorder).to_chrome_trace()))
    prefetch, stall = sorted(complete_events(trace), key=lambda event: event["ts"])
    assert (prefetch["name"], prefetch["cat"], prefetch["ts"], prefetch["dur"]) == ("P2", "h2d", 0.0, 1500.0)
    assert prefetch["args"] == {"unit": 2, "name": "blocks.2", "bytes": 640}
    assert (stall["name"], stall["cat"], stall["ts"], stall["dur"]) == ("stall", "stall", 500.0, 1000.0)


def test_chrome_trace_counts_memory_by_kind() -> None:
    recording = simulate_step(num_units=3, k=2)
    counters = [event for event in recording.to_chrome_trace()["traceEvents"] if event["ph"] == "C"]
    assert [tuple(event["args"].values()) for event in counters] == [tuple(sample[1:]) for sample in recording.samples]
    assert list(counters[0]["args"]) == ["slots", "anchors", "gradients", "activations"]


def test_events_of_one_track_never_cross() -> None:
    recorder = Recorder()
    for at in range(300):  # thirds do not round; three copies at once need three tracks
        recorder.span(Lane.H2D, "P", 0, at / 3e6, (at + 3) / 3e6)
        recorder.span(Lane.COMPUTE, "F", 0, at / 3e6, (at + 1) / 3e6)
    events = complete_events(finished(recorder).to_chrome_trace())
    tracks: dict[int, list[tuple[int, int]]] = {event["tid"]: [] for event in events}
    for event in sorted(events, key=lambda event: event["ts"]):
        tracks[event["tid"]].append((round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)))
    assert len(tracks) == 4
    assert all(early[1] <= late[0] for events in tracks.values() for early, late in pairwise(events))
