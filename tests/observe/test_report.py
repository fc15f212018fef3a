from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from io import StringIO

import pytest
from rich.console import Console

from lightning_superpipe.observe import PeakBytes, Report, StepCounters
from lightning_superpipe.observe.host_bytes import HostBytes

REPORT = Report(
    k=4,
    k_prime=2,
    num_resident=0,
    num_units=26,
    num_steps=400,
    peak=PeakBytes(slots=36 << 20, anchors=3 << 20, gradients=24 << 20, activations=55 << 20),
    resident_bytes=576 << 20,
    num_parameters=75 << 20,
    host=HostBytes(weights=300 << 20, gradients=300 << 20, states=300 << 20),
    last_step=StepCounters(num_loads=48, h2d_bytes=500 << 20, d2h_bytes=300 << 20, stall_seconds=0.0213),
    total=StepCounters(19_200, 2, 200_000 << 20, 120_000 << 20, 8.5),
    device="emu:0",
    emulated=True,
    unit_overhead_us=34.2,
)


def test_counters_add_and_subtract_field_by_field() -> None:
    one, two = StepCounters(1, 2, 3, 4, 0.5), StepCounters(10, 20, 30, 40, 0.25)
    assert one + two == StepCounters(11, 22, 33, 44, 0.75)
    assert (one + two) - two == one
    assert one + StepCounters() == one


def test_a_report_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        REPORT.k = 5  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        REPORT.total.num_loads = 5  # type: ignore[misc]


def test_short_names_are_totals_of_the_run() -> None:
    short = tuple(vars(REPORT.total))
    assert {"num_loads", "num_plan_misses", "h2d_bytes", "d2h_bytes", "stall_seconds", "disk_read_bytes"} < set(short)
    assert {name: getattr(REPORT, name) for name in short} == vars(REPORT.total)
    assert REPORT.peak_device_bytes == REPORT.peak.total == 118 << 20


def test_metrics_hold_every_number_under_the_prefix_as_floats() -> None:
    metrics = REPORT.as_metrics()
    assert all(name.startswith("superpipe/") and type(value) is float for name, value in metrics.items())
    assert metrics["superpipe/peak_device_bytes"] == 118 << 20
    assert metrics["superpipe/peak_gradients_bytes"] == 24 << 20
    assert metrics["superpipe/num_loads"] == 19_200
    assert metrics["superpipe/last_step_num_loads"] == 48
    assert metrics["superpipe/last_step_stall_seconds"] == 0.0213
    numbers = 13 + 4 + 4 + 7 + 7  # own, peak by kind, host by kind, total, last step
    assert len(metrics) == numbers
    assert set(REPORT.as_metrics(prefix="")) == {name.removeprefix("superpipe/") for name in metrics}


@pytest.mark.parametrize(
    "row",
    [
        ["superpipe on emu:0", "emulated", "k=4 of 26 units", "k'=2", "400 steps"],
        ["slots", "36.0 MiB", "6.2%"],
        ["gradients", "24.0 MiB", "4.2%"],
        ["device peak", "118.0 MiB", "20.5%"],
        ["ordinary run, at least", "576.0 MiB"],
        ["weights", "300.0 MiB", "4.00"],
        ["host", "900.0 MiB", "12.00"],
        ["loads", "48", "19,200"],
        ["plan misses", "0", "2"],
        ["host to device", "500.0 MiB", "195.3 GiB"],
        ["device to host", "300.0 MiB", "117.2 GiB"],
        ["stall", "21.3 ms", "8.50 s"],
        ["engine, each unit", "34.2 μs"],
    ],
)
def test_the_table_shows_each_number_in_its_row(row: list[str]) -> None:
    assert [line for line in str(REPORT).splitlines() if all(part in line for part in row)] != []


def test_text_is_plain_and_narrow_whatever_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = str(REPORT)
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "20"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    assert str(REPORT) == plain
    assert "\x1b" not in plain
    assert max(len(line) for line in plain.splitlines()) <= 100
    assert all(line == line.rstrip() and line for line in plain.splitlines())


def test_a_terminal_gets_colour() -> None:
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=100)
    with console.capture() as capture:
        console.print(REPORT)
    assert "\x1b[1m" in capture.get()


def test_measured_numbers_are_not_called_emulated() -> None:
    assert "emulated" not in str(replace(REPORT, emulated=False, device="cuda:0"))


def test_a_report_before_the_first_step_prints() -> None:
    fresh = replace(
        REPORT, num_steps=0, peak=PeakBytes(), resident_bytes=0, last_step=StepCounters(), total=StepCounters()
    )
    assert "0 steps" in str(fresh)
