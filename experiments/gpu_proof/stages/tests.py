"""Stage 1: do the tests that need a GPU hold here?"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings

__all__ = ["grids", "run"]

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "tests/gpu"
_CLOSING_S = 20.0
_KINDS = ("failure", "error", "skipped")


def run(bench: Bench) -> Findings:
    """Run ``pytest -m gpu`` and count."""
    bench.out.mkdir(parents=True, exist_ok=True)
    report, log = bench.out / "tests.xml", bench.out / "tests.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", FOLDER, f"--junitxml={report}", "-p", "no:cacheprovider"]
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as tests:
        problem = _wait(tests, max(1.0, bench.deadline.left_s - _CLOSING_S))
    if not report.exists():
        return Findings(problem=f"{problem or 'pytest wrote no report'}; see {log.name}")
    facts = count(report)
    problems = [problem, f"{len(facts['failed'])} tests fail; see {log.name}" if facts["failed"] else ""]
    return Findings(facts=facts, problem="; ".join(filter(None, problems)))


def _wait(tests: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for pytest; when its time is up let it write what it has. Return what went wrong besides failing tests."""
    try:
        code = tests.wait(seconds)
    except subprocess.TimeoutExpired:
        tests.send_signal(signal.SIGINT)
        try:
            tests.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            tests.kill()
        return "the stage's minutes were over before the tests were"
    return "" if code in (0, 1) else f"pytest ended with {code}"


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
