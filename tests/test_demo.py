"""The demo runs, writes what it says, and claims no more than it measured."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lightning_superpipe.demo import __main__ as demo
from lightning_superpipe.observe import Recording

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
TINY = ["--steps", "3", "--layers", "3", "--width", "64", "--context", "32", "--batch-size", "2"]
PICTURES = ("memory.svg", "memory-dark.svg", "timeline.svg", "timeline-dark.svg")


def run_demo(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a tiny demo printed, and its report."""
    command = [sys.executable, "-m", "lightning_superpipe.demo", *TINY, *options, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[str, dict[str, Any]]:
    return run_demo(folder, "--k", "3", "--k-prime", "2")


def test_all_files_are_there_and_parse(ran: tuple[str, dict[str, Any]], folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *PICTURES, "recording.json", "report.json", "sample.txt", "trace.json"
    }  # fmt: skip
    recording = Recording.load(folder / "recording.json")
    assert (recording.k, recording.k_prime, recording.emulated) == (3, 2, True)
    assert {span.name for span in recording.spans} >= {"F", "B", "P", "G"}
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    for name in PICTURES:
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
        assert name in ran[0]
    assert "def " in (folder / "sample.txt").read_text()


def test_losses_are_those_of_every_step_and_finite(ran: tuple[str, dict[str, Any]]) -> None:
    losses = ran[1]["losses"]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(256), abs=0.4)  # an untrained network knows nothing
    assert math.isfinite(ran[1]["held_out_bits_per_byte"])


def test_the_peak_is_within_the_budget_and_is_said_to_be(ran: tuple[str, dict[str, Any]], folder: Path) -> None:
    report = ran[1]
    measured = Recording.load(folder / "recording.json").peak
    assert measured is not None
    assert measured.total <= report["peak_bytes"] <= report["budget_bytes"] == 96 * 2**20
    assert report["is_within_budget"] is True
    assert "Budget kept" in ran[0]
    assert "EXCEEDED" not in ran[0]


def test_it_says_that_the_device_is_emulated(ran: tuple[str, dict[str, Any]]) -> None:
    assert "emulated" in ran[0].split("\n\n")[0]
    assert ran[1]["emulated"] is True


def test_a_peak_above_the_budget_is_not_called_kept(tmp_path: Path) -> None:
    printed, report = run_demo(tmp_path, "--device-memory", "1MiB")
    assert report["peak_bytes"] > report["budget_bytes"] == 2**20
    assert report["is_within_budget"] is False
    assert "BUDGET EXCEEDED" in printed
    assert "Budget kept" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory", "1KiB"], r"device_memory allows 1.0 KiB"),
        (["--device-memory", "much"], r"'much' is not a size"),
        (["--k", "2", "--k-prime", "3"], r"k_prime=3 is larger than k=2"),
        (["--out", "/dev/null/folder"], r"/dev/null"),
    ],
)
def test_an_option_that_cannot_work_ends_with_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert demo.main([*TINY, "--out", str(tmp_path), *options]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "transformers" else object())
    assert demo.main([]) == 1
    error = capsys.readouterr().err
    assert "transformers" in error
    assert "lightning_superpipe[demo]" in error
    assert "matplotlib" not in error
