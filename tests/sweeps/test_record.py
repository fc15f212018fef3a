from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import pytest

from lightning_superpipe.errors import BudgetError, ConfigError, TransferError
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.observe.trace import software_versions
from lightning_superpipe.sweeps import JobResult, Row, Status, record_job
from lightning_superpipe.sweeps.files import read_rows
from tests.sweeps.made_up import MIB, config, plain, result


class Jobs:
    """Counts how often work was done."""

    def __init__(self) -> None:
        self.num_runs = 0

    def finish(self) -> JobResult:
        self.num_runs += 1
        return result(2)

    def crash(self) -> NoReturn:
        self.num_runs += 1
        raise ZeroDivisionError("by the test")

    def stop(self) -> NoReturn:
        self.num_runs += 1
        raise KeyboardInterrupt


def test_a_row_says_what_was_asked_where_it_ran_and_what_came(tmp_path: Path) -> None:
    row = record_job(tmp_path, config(2, seed=7), lambda: result(2), is_sweep=True)
    assert (row.status, row.k, row.k_prime, row.loss, row.step_ms) == (Status.FINISHED, 2, 1, 3.25, 72.0)
    assert row.peak == PeakBytes(slots=2 * MIB, anchors=MIB // 2, gradients=MIB, activations=3 * MIB)
    assert (row.num_loads, row.num_steps, row.stall_ms) == (22, 4, 15.0)
    assert (row.device, row.emulated, row.num_units) == ("cpu", True, 12)
    assert row.config == config(2, seed=7)
    assert row.versions == software_versions()
    assert {"system", "cores"} <= set(row.machine)
    assert read_rows(tmp_path).good == (row,)


def test_every_field_survives_the_file(tmp_path: Path) -> None:
    rows = {
        record_job(tmp_path, config(2), lambda: result(2), is_sweep=True).fingerprint: Status.FINISHED,
        record_job(tmp_path, config(3), Jobs().crash, is_sweep=True).fingerprint: Status.FAILED,
        record_job(tmp_path, plain(), lambda: JobResult(1.5, 2.5, {"val": math.inf}), is_sweep=True).fingerprint: (
            Status.FINISHED
        ),
    }
    found = read_rows(tmp_path)
    assert {row.fingerprint: row.status for row in found.good} == rows
    assert found.corrupt == ()
    assert all(Row.from_json(row.to_json()) == row for row in found.good)


def test_an_impossible_window_is_recorded_as_refused_with_its_reason(tmp_path: Path) -> None:
    row = record_job(tmp_path, config(1, 2), lambda: result(1, 2), is_sweep=True)
    assert (row.status, row.k, row.k_prime) == (Status.REFUSED, 1, 2)
    assert row.error is not None
    assert row.error.startswith("k_prime=2 is larger than k=1")


def test_a_crash_is_recorded_with_its_traceback_and_the_next_job_runs(tmp_path: Path) -> None:
    jobs = Jobs()
    crashed = record_job(tmp_path, config(1), jobs.crash, is_sweep=True)
    after = record_job(tmp_path, config(2), jobs.finish, is_sweep=True)
    assert (crashed.status, after.status) == (Status.FAILED, Status.FINISHED)
    assert crashed.error is not None
    assert "in crash" in crashed.error
    assert crashed.error.endswith("ZeroDivisionError: by the test\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [(BudgetError("too small"), Status.REFUSED), (TransferError("a copy broke"), Status.FAILED)],
)
def test_a_broken_copy_is_no_refusal(error: Exception, status: Status, tmp_path: Path) -> None:
    def raises() -> NoReturn:
        raise error

    assert record_job(tmp_path, config(1), raises, is_sweep=True).status is status


@pytest.mark.parametrize("kind", [ConfigError, ZeroDivisionError])
def test_alone_a_job_raises_what_it_met_after_writing_it_down(kind: type[Exception], tmp_path: Path) -> None:
    def raises() -> NoReturn:
        raise kind("by the test")

    with pytest.raises(kind, match="by the test"):
        record_job(tmp_path, config(1), raises, is_sweep=False)
    (row,) = read_rows(tmp_path).good
    assert not row.is_finished


def test_a_resumed_sweep_repeats_no_finished_job(tmp_path: Path) -> None:
    jobs = Jobs()
    first = [record_job(tmp_path, config(2, seed=seed), jobs.finish, is_sweep=True) for seed in (0, 1)]
    again = [record_job(tmp_path, config(2, seed=seed), jobs.finish, is_sweep=True) for seed in (0, 1, 2)]
    assert jobs.num_runs == 3
    assert again[:2] == first


def test_alone_a_job_runs_as_often_as_it_is_asked(tmp_path: Path) -> None:
    jobs = Jobs()
    for _ in range(2):
        record_job(tmp_path, config(2), jobs.finish, is_sweep=False)
    assert jobs.num_runs == 2
    assert len(read_rows(tmp_path).good) == 1


def test_a_resumed_sweep_tries_a_crashed_job_again(tmp_path: Path) -> None:
    jobs = Jobs()
    record_job(tmp_path, config(2), jobs.crash, is_sweep=True)
    assert record_job(tmp_path, config(2), jobs.finish, is_sweep=True).is_finished
    assert [row.status for row in read_rows(tmp_path).good] == [Status.FINISHED]


def test_an_interrupted_job_leaves_no_row_and_runs_again(tmp_path: Path) -> None:
    jobs = Jobs()
    record_job(tmp_path, config(1), jobs.finish, is_sweep=True)
    with pytest.raises(KeyboardInterrupt):
        record_job(tmp_path, config(2), jobs.stop, is_sweep=True)
    assert len(read_rows(tmp_path).good) == 1
    assert record_job(tmp_path, config(2), jobs.finish, is_sweep=True).is_finished


def test_a_corrupt_row_is_run_again_and_replaced(tmp_path: Path) -> None:
    jobs = Jobs()
    record_job(tmp_path, config(2), jobs.finish, is_sweep=True)
    (path,) = (tmp_path / "rows").iterdir()
    path.write_text(path.read_text()[:40])
    record_job(tmp_path, config(2), jobs.finish, is_sweep=True)
    assert jobs.num_runs == 2
    assert read_rows(tmp_path).corrupt == ()


def test_what_a_search_makes_small_is_infinite_without_a_number_or_above_the_cap(tmp_path: Path) -> None:
    finished = record_job(tmp_path, config(2), lambda: result(2), is_sweep=True)
    crashed = record_job(tmp_path, config(3), Jobs().crash, is_sweep=True)
    unmeasured = record_job(tmp_path, plain(), lambda: JobResult(1.0, 5.0), is_sweep=True)
    assert finished.peak is not None
    peak = finished.peak.total
    assert (finished.objective(), finished.objective(peak), finished.objective(peak - 1)) == (72.0, 72.0, math.inf)
    assert (crashed.objective(), unmeasured.objective(), unmeasured.objective(peak)) == (math.inf, 5.0, math.inf)
