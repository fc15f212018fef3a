"""Sweeps as users start them: the command line, Hydra's sweepers and launchers, real jobs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_superpipe.app.main import main
from lightning_superpipe.sweeps.files import Rows, read_rows
from tests.app.conftest import Ran

Command = Callable[..., Ran]

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = ("experiment=tiny", "debug=tiny", "logger=none")
ENDING = (*TINY, "model._target_=tests.sweeps.ending.Ending")
FOLDER = Path("multirun/tiny")


def rows() -> Rows:
    return read_rows(FOLDER)


def outcome() -> dict[tuple[Any, Any], str]:
    """How each window ended."""
    return {(row.k, row.k_prime): row.status.value for row in rows().good}


def written() -> dict[Path, int]:
    """Each row's file, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (FOLDER / "rows").iterdir()}


def test_a_grid_records_each_pair_and_refuses_the_impossible_ones(superpipe: Command) -> None:
    ran = superpipe("-m", *TINY, "superpipe.k=1,2", "superpipe.k_prime=1,2")
    assert ran.status == 0
    assert outcome() == {(1, 1): "finished", (1, 2): "refused", (2, 1): "finished", (2, 2): "finished"}
    assert len({row.loss for row in rows().good if row.is_finished}) == 1
    assert "k_prime=2 is larger than k=1" in ran.out


def test_the_named_grid_needs_no_flag(superpipe: Command) -> None:
    assert superpipe(*TINY, "sweep=k_and_k_prime", "superpipe.k=1,2", "superpipe.k_prime=1").status == 0
    assert outcome() == {(1, 1): "finished", (2, 1): "finished"}


def test_a_crash_in_one_job_does_not_stop_the_sweep(superpipe: Command) -> None:
    assert superpipe("-m", *ENDING, "+model.crashes=true,false").status == 0
    statuses = {row.config["model"]["crashes"]: row.status.value for row in rows().good}
    assert statuses == {True: "failed", False: "finished"}
    (error,) = [row.error for row in rows().good if row.error]
    assert "ZeroDivisionError: by the test" in error


def test_an_interrupted_sweep_resumes_where_it_was(superpipe: Command) -> None:
    command = ("-m", *ENDING, "superpipe.k=1,2,3")
    assert superpipe("-m", *ENDING, "superpipe.k=1").status == 0
    first = written()
    Path("stop").touch()
    assert superpipe(*command).status != 0
    assert written() == first  # the first job was not repeated, the second was cut off
    Path("stop").unlink()
    assert superpipe(*command).status == 0
    assert outcome() == {(1, 1): "finished", (2, 1): "finished", (3, 1): "finished"}
    assert {path: time for path, time in written().items() if path in first} == first


def test_the_ordinary_run_stands_in_the_same_table(superpipe: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert superpipe("-m", *TINY, "superpipe.k=1,2").status == 0
    assert superpipe("-m", *TINY, "superpipe=off", "~superpipe.k").status == 0
    assert main(["report", str(FOLDER)]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in printed if line.split()[:1] in (["off"], ["1"], ["2"])}
    assert set(lines) == {"off", "1", "2"}
    assert " x " in lines["1"] and " x " in lines["2"] and " x " not in lines["off"]
    assert (FOLDER / "trade_off.svg").exists()


def test_optuna_finds_the_fastest_window_under_the_cap_and_resumes(superpipe: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
    space = ("superpipe.k=choice(1,2,3,4)", "superpipe.k_prime=choice(1,2)", "hydra.sweeper.n_trials=5")
    assert superpipe(*TINY, "sweep=optuna", *space).status == 0
    peaks = sorted(row.peak.total for row in rows().good if row.peak is not None)
    cap, before = peaks[len(peaks) // 2], written()
    assert superpipe(*TINY, "sweep=optuna", f"memory_cap={cap}", *space, "hydra.sweeper.n_trials=8").status == 0
    found = yaml.safe_load((FOLDER / "optimization_results.yaml").read_text())
    fitting = [row for row in rows().good if row.objective(cap) < math.inf]
    best = min(fitting, key=lambda row: row.objective())
    assert found["best_value"] == best.objective()
    window = {name.removeprefix("superpipe."): value for name, value in found["best_params"].items()}
    assert (window["k"], window["k_prime"]) == (best.k, best.k_prime)
    finished = {path for path in before if json.loads(path.read_text())["status"] == "finished"}
    assert {path: written()[path] for path in finished} == {path: before[path] for path in finished}


@pytest.mark.slow
def test_joblib_runs_jobs_in_processes_of_their_own(superpipe: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher.joblib_launcher")
    assert superpipe("-m", *TINY, "sweep=joblib", "superpipe.k=1,2", "superpipe.k_prime=2").status == 0
    assert outcome() == {(1, 2): "refused", (2, 2): "finished"}
