from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

from lightning_superpipe.sweeps import JobResult, SweepReport, print_report, record_job
from lightning_superpipe.sweeps.picture import draw_trade_off
from tests.sweeps.made_up import MIB, config, plain, result, sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with jobs that finished, were refused and crashed."""
    path = tmp_path_factory.mktemp("sweep")

    def crash() -> NoReturn:
        raise ZeroDivisionError("by the test")

    sweep(path)
    record_job(path, config(3), crash, is_sweep=True)
    return path


def line_of(report: str, *start: str) -> str:
    """The table's line that begins with these cells, with one space between words."""
    (cells,) = [line.split() for line in report.splitlines() if line.split()[: len(start)] == list(start)]
    return " ".join(cells)


def texts(path: Path) -> list[str]:
    return [(node.text or "").strip() for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def test_the_table_compares_each_job_with_the_ordinary_run(folder: Path) -> None:
    report = str(SweepReport.of(folder))
    assert line_of(report, "2", "1") == "2 1 6.5 MiB 4.5 MiB 16.2% 72.0 ms 2.06 x 22 15.0 ms 3.25 on the front"
    assert line_of(report, "off") == "off 35.0 ms 3.25 finished"


def test_the_table_tells_what_went_wrong(folder: Path) -> None:
    report = str(SweepReport.of(folder))
    assert report.splitlines()[0] == "8 jobs: 6 finished, 1 refused, 1 failed (emulated link and memory)"
    assert line_of(report, "1", "2") == "1 2 refused"
    assert "k=1, k'=2 refused: k_prime=2 is larger than k=1" in report
    assert "k=3, k'=1 failed: ZeroDivisionError: by the test" in report


def test_only_jobs_that_no_other_beats_are_on_the_front(folder: Path) -> None:
    lines = [line.split()[:2] for line in str(SweepReport.of(folder)).splitlines() if line.endswith("on the front")]
    assert lines == [["1", "1"], ["2", "1"], ["4", "1"]]


def test_measured_numbers_are_not_called_emulated(tmp_path: Path) -> None:
    sweep(tmp_path, ks=(1,), k_primes=(1,), emulated=False)
    report = SweepReport.of(tmp_path)
    assert "emulated" not in str(report)
    (light, _) = report.draw(tmp_path)
    assert not any("emulated" in text for text in texts(light))


def test_settings_that_differ_have_a_column(tmp_path: Path) -> None:
    for seed in (0, 1):
        record_job(tmp_path, config(2, seed=seed), lambda: result(2), is_sweep=True)
    lines = str(SweepReport.of(tmp_path)).splitlines()
    assert sorted(line.split()[-1] for line in lines if line.split()[:2] == ["2", "1"]) == ["seed=0", "seed=1"]


@pytest.mark.parametrize(("dark", "background"), [(False, "#ffffff"), (True, "#0d1117")])
def test_the_picture_names_windows_and_says_that_it_is_emulated(
    dark: bool, background: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "picture.svg"
    draw_trade_off(SweepReport.of(folder).rows, path, dark)
    shown = texts(path)
    assert "Peak device memory against step time (emulated link and memory)" in shown
    assert {"k = 1", "k = 2", "k = 4", "k' = 1", "k' = 2", "k=1, k'=1", "k=4, k'=1"} <= set(shown)
    assert "k=4, k'=2" not in shown  # not on the front
    assert "ordinary run: at least 40.0 MiB, 7.3 times the smallest peak" in shown
    assert background in path.read_text()
    assert ElementTree.parse(path).getroot().get("width") == "675pt"  # 900 pixels of CSS


def test_each_job_has_its_point_and_each_prediction_its_outline(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"

    def num_markers(rows: object) -> int:
        draw_trade_off(rows, path)  # type: ignore[arg-type]
        return sum(node.tag.endswith("}use") for node in ElementTree.parse(path).iter())

    rows = SweepReport.of(folder).rows
    streamed = [row for row in rows if row.peak is not None]
    assert num_markers(streamed) - num_markers(streamed[:-1]) == 2


def test_a_common_budget_is_drawn(tmp_path: Path) -> None:
    record_job(tmp_path, config(2, device_memory="8MiB"), lambda: result(2), is_sweep=True)
    (light, _) = SweepReport.of(tmp_path).draw(tmp_path)
    assert "budget: 8.0 MiB" in texts(light)


def test_equal_sweeps_give_equal_files(folder: Path, tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw_trade_off(SweepReport.of(folder).rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_printing_shows_the_table_and_where_the_pictures_are(folder: Path) -> None:
    console = Console(file=StringIO(), width=200)
    paths = print_report(folder, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert [path.name for path in paths] == ["trade_off.svg", "trade_off-dark.svg"]
    assert all(path.exists() and str(path) in printed for path in paths)
    assert "8 jobs" in printed


def test_a_sweep_of_ordinary_runs_has_a_table_and_no_picture(tmp_path: Path) -> None:
    record_job(tmp_path, plain(), lambda: JobResult(1.0, MIB), is_sweep=True)
    console = Console(file=StringIO())
    assert print_report(tmp_path, console) == ()
    assert "no picture" in console.file.getvalue()  # type: ignore[attr-defined]
