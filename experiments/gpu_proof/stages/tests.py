"""Stage 1: do the tests that need a GPU hold here?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings

__all__ = ["grids", "run"]

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "tests/gpu"
_CLOSING_S = 30.0  # of the stage's time, for the last test and the report
_KINDS = ("failure", "error", "skipped")


def run(bench: Bench) -> Findings:
    """Run ``pytest -m gpu`` and count; when the minutes are over, the test that runs is the last (pytest-timeout)."""
    bench.out.mkdir(parents=True, exist_ok=True)
    report, log = bench.out / "tests.xml", bench.out / "tests.log"
    report.unlink(missing_ok=True)
    limit_s = max(1, int(bench.deadline.left_s - _CLOSING_S))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", FOLDER, "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"--session-timeout={limit_s}"]
    with log.open("w") as file:
        try:
            told = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit_s + _CLOSING_S)
        except subprocess.TimeoutExpired:
            return Findings(problem=f"stopped: a test did not end in the stage's minutes; see {log.name}")
    if not report.exists():
        return Findings(problem=f"pytest ended with {told.returncode} and no report; see {log.name}")
    facts = count(report)
    problems = [f"{len(facts['failed'])} tests fail"] if facts["failed"] else []
    if "session-timeout" in log.read_text(errors="replace"):
        problems.append("the stage's minutes were over before the tests were")
    elif told.returncode and not problems:
        problems.append(f"pytest ended with {told.returncode}")
    return Findings(facts=facts, problem="; ".join([*problems, f"see {log.name}"]) if problems else "")


def count(report: Path) -> dict[str, list[str]]:
    """Return the names of the tests by how they ended, and the reasons of those that were skipped."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "reasons": []}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        ends = [child for child in case if child.tag in _KINDS]
        if not ends:
            found["passed"].append(name)
        elif ends[0].tag == "skipped":
            found["skipped"].append(name)
            found["reasons"] = sorted({*found["reasons"], str(ends[0].get("message"))})
        else:
            found["failed"].append(name)
    return found


def grids(result: StageResult) -> list[Grid]:
    """One line with the counts, and the names of those that fail."""
    facts = result.facts
    if not facts:
        return []
    counts = [str(len(facts[kind])) for kind in ("passed", "failed", "skipped")]
    notes = [f"fails: {name}" for name in facts["failed"]] + [f"skipped: {reason}" for reason in facts["reasons"]]
    return [Grid("Tests that need a GPU", ["passed", "failed", "skipped"], [counts], "; ".join(notes))]
