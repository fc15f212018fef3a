from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.sweeps import Row, Status
from lightning_superpipe.sweeps.front import baseline_of, pareto_front, varied_settings


def row(name: str, peak: int | None = None, step_ms: float | None = None, **others: Any) -> Row:
    fixed: dict[str, Any] = {"config": {}, "versions": {}, "machine": {}, "seconds": 0.0, "status": Status.FINISHED}
    held = None if peak is None else PeakBytes(slots=peak)
    return Row(fingerprint=name, peak=held, step_ms=step_ms, **{**fixed, **others})


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_holds_exactly_what_no_other_job_beats(points: list[tuple[int, int]]) -> None:
    front = [(each.peak_device_bytes, each.step_ms) for each in pareto_front([row("", *point) for point in points])]
    unbeaten = {
        (peak, step_ms)
        for peak, step_ms in points
        if not any(p <= peak and s <= step_ms and (p, s) != (peak, step_ms) for p, s in points)
    }
    assert set(front) == unbeaten
    assert front == sorted(unbeaten)  # each once, smallest first


def test_jobs_without_both_numbers_are_not_on_the_front() -> None:
    rows = [row("peak", peak=1), row("time", step_ms=1.0), row("both", peak=5, step_ms=5.0)]
    assert [each.fingerprint for each in pareto_front(rows)] == ["both"]


def test_the_baseline_is_the_same_experiment_without_streaming_on_the_same_machine() -> None:
    streamed = row("s", config={"superpipe": {"k": 2}, "seed": 1}, k=2, machine={"cores": "2"})
    rows = [
        streamed,
        row("other seed", step_ms=1.0, config={"superpipe": None, "seed": 2}, machine={"cores": "2"}),
        row("other machine", step_ms=2.0, config={"superpipe": None, "seed": 1}, machine={"cores": "64"}),
        row(
            "crashed", step_ms=3.0, config={"superpipe": None, "seed": 1}, machine={"cores": "2"}, status=Status.FAILED
        ),
        row("right", step_ms=4.0, config={"superpipe": None, "seed": 1}, machine={"cores": "2"}),
    ]
    found = baseline_of(streamed, rows)
    assert found is not None
    assert found.fingerprint == "right"
    assert baseline_of(streamed, rows[:-1]) is None


def test_settings_that_differ_are_named_and_the_windows_own_are_not() -> None:
    rows = [
        row("a", config={"superpipe": {"k": 1, "link": None}, "trainer": {"lr": 1}, "seed": 0}, k=1),
        row("b", config={"superpipe": {"k": 2, "link": "slow"}, "trainer": {"lr": 1}, "seed": 3}, k=2),
        row("off", config={"superpipe": None, "trainer": {"lr": 1}, "seed": 0}),
    ]
    assert varied_settings(rows) == {
        "a": {"seed": "0", "superpipe.link": "null"},
        "b": {"seed": "3", "superpipe.link": "slow"},
        "off": {"seed": "0"},
    }
