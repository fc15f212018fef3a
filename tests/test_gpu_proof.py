"""The harness that proves the package on a GPU, run end to end where there is none: stages, peers, tables."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from experiments.gpu_proof import peers, publish, result, tasks
from experiments.gpu_proof.job import CannotRun, Job, Outcome, Status
from experiments.gpu_proof.result import StageResult, load_results
from experiments.gpu_proof.stages import STAGES, Bench, run_stage
from experiments.gpu_proof.stages.peers import INFERENCE, TRAINING
from experiments.gpu_proof.watch import Deadline, Watcher
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe import MachineProfile

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "gpu_proof" / "prove.py"
pytestmark = pytest.mark.slow
LABEL = "CPU, tiny size, emulation"


def prove(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a machine without a GPU would, whatever this one has."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def folder(emu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every stage at tiny size on the emulated device."""
    out = tmp_path_factory.mktemp("proof")
    ran = prove("--size", "tiny", "--out", str(out))
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert LABEL in ran.stdout
    return out


def stage(folder: Path, name: str) -> StageResult:
    return StageResult.load(folder / f"{name}.json")


def by_peer(outcomes: Sequence[Outcome], task: str) -> dict[tuple[str, bool], Outcome]:
    return {(one.job.peer, one.job.checkpointing): one for one in outcomes if one.job.task == task}


def test_every_stage_is_whole_and_says_what_a_figure_needs(folder: Path) -> None:
    results = load_results(folder, STAGES)
    assert [each.stage for each in results] == list(STAGES)
    for each in results:
        assert (each.label, each.emulated, each.problem, each.size) == (LABEL, True, "", "tiny")
        assert each.command.startswith("python experiments/gpu_proof/prove.py --size tiny")
        assert {"python", "torch", "lightning", "transformers"} <= set(each.versions)
        assert {"system", "cores", "memory"} <= set(each.machine)


def test_gpu_tests_are_skipped_with_a_reason_where_there_is_none(folder: Path) -> None:
    facts = stage(folder, "tests").facts
    assert (facts["passed"], facts["failed"]) == ([], [])
    assert len(facts["skipped"]) > 20
    assert facts["reasons"] == ["needs a CUDA or ROCm device, and torch sees none"]


def test_the_machine_profile_is_a_file_of_its_own(folder: Path) -> None:
    profile = MachineProfile.load(folder / "profile.json")
    assert profile.emulated
    assert MachineProfile.from_dict(stage(folder, "machine").outcomes[0].report) == profile


def test_the_trace_opens_in_perfetto_and_has_pictures(folder: Path) -> None:
    (outcome,) = stage(folder, "trace").outcomes
    events = json.loads((folder / "trace" / "trace.json").read_text())["traceEvents"]
    assert {"F0", "B0", "P0"} <= {event["name"] for event in events}
    assert all((folder / "trace" / name).stat().st_size > 0 for name in outcome.report["files"])
    assert {"timeline.svg", "memory.svg"} <= set(outcome.report["files"])
    assert outcome.report["moved_bytes"]["h2d"] > outcome.report["moved_bytes"]["d2h"] > 0


def test_every_window_leaves_the_losses_of_the_resident_run_in_less_memory(folder: Path) -> None:
    resident, *windows = stage(folder, "sweep").outcomes
    assert len(windows) == 3
    for window in windows:
        assert window.report["losses"] == resident.report["losses"]
        assert (window.device_peak_bytes or 0) < 0.5 * (resident.device_peak_bytes or 0)
        assert window.report["superpipe"]["k"] == window.job.k


def test_peers_train_and_infer_or_say_why_not(folder: Path) -> None:
    outcomes = stage(folder, "peers").outcomes
    assert len(outcomes) == len(TRAINING) + len(INFERENCE)
    for one in outcomes:
        package = import_module(f"{peers.__name__}.{one.job.peer}").PACKAGE
        if package is not None and find_spec(package) is None:
            assert (one.status, one.reason) == (
                Status.MISSING,
                f"ModuleNotFoundError: package {package!r} is not installed",
            )
        elif "cpu" not in peers.devices_of(one.job.peer):
            assert one.status is Status.REFUSED and "not on cpu" in one.reason
        else:
            assert one.status is Status.OK, one.reason
            assert one.tokens_per_s and one.host_life_bytes >= one.host_peak_bytes > 0


def test_whoever_trains_has_the_resident_runs_losses(folder: Path) -> None:
    trained = by_peer(stage(folder, "peers").outcomes, "train")
    resident = trained["resident", False].report["losses"]
    assert resident[-1] < resident[0] - 0.1
    for key in (("resident", True), ("superpipe", False), ("superpipe", True)):
        assert trained[key].report["losses"] == resident
    # On the CPU itself operators decompose otherwise than on the emulated device.
    assert trained["fsdp2", True].report["losses"] == pytest.approx(resident, rel=1e-2)


def test_whoever_infers_has_the_resident_runs_logits(folder: Path) -> None:
    inferred = by_peer(stage(folder, "peers").outcomes, "infer")
    resident = inferred["resident", False].report["losses"]
    assert inferred["superpipe", False].report["losses"] == resident
    assert inferred["accelerate_offload", False].report["losses"] == pytest.approx(resident, abs=1e-4)


def test_headroom_finds_where_memory_ends_and_streaming_goes_further(folder: Path) -> None:
    resident, streamed = stage(folder, "headroom").facts["found"]
    assert (resident["peer"], streamed["peer"]) == ("resident", "superpipe")
    assert resident["fails"] == resident["fits"] + 1
    assert streamed["fits"] >= 4 * resident["fits"]
    tried = {(one.job.peer, one.job.num_blocks): one for one in stage(folder, "headroom").outcomes}
    assert tried["resident", resident["fails"]].status is Status.NO_MEMORY
    assert (tried["superpipe", streamed["fits"]].device_peak_bytes or 0) <= resident["cap_bytes"]


def test_resuming_runs_nothing_that_is_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stage(folder, "sweep")
    known = result.known_outcomes(folder / "sweep.json", LABEL)
    bench = Bench("tiny", "emu", 0, folder, Watcher("emu", folder), Deadline.after(0.0), print, known=known)
    assert run_stage("sweep", bench).outcomes == before.outcomes
    assert capsys.readouterr().out == "", "no process was started"
    late = run_stage("sweep", replace(bench, known={}))
    assert {one.status for one in late.outcomes} == {Status.LATE} and late.problem.startswith("without numbers: train-")
    with pytest.raises(SuperpipeError, match="leave --resume out"):
        result.known_outcomes(folder / "sweep.json", "another machine")


# -- tables


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """A page for all tables, and a first page, both empty."""
    found = tmp_path / "page.md", tmp_path / "README.md"
    for path in found:
        path.write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    return found


def publish_to(folder: Path, pages: tuple[Path, Path]) -> int:
    return publish.main([str(folder), "--page", str(pages[0]), "--readme", str(pages[1])])


def test_an_emulation_fills_its_own_page_and_never_the_first(folder: Path, pages: tuple[Path, Path]) -> None:
    first = pages[1].read_text()
    assert publish_to(folder, pages) == 0
    text = pages[0].read_text()
    assert text.startswith(f"before\n{publish.BEGIN}\n**{LABEL}**") and text.endswith(f"{publish.END}\nafter\n")
    assert "old" not in text
    for title in ("Windows", "Training, side by side", "Inference, side by side", "Largest model", "Copies between"):
        assert text.count(f"**{title}") == 1
    assert text.count(f"({LABEL})") == 8
    assert "tokens/s" not in text and "Speed is left out" in text
    assert pages[1].read_text() == first
    assert not (folder / "sweep.svg").exists()
    assert publish_to(folder, pages) == 0
    assert pages[0].read_text() == text


def as_measured(found: StageResult, slowdown: float) -> StageResult:
    """A result as if a GPU had given it, every step of superpipe so many times as long as the resident run's."""
    outcomes = []
    for one in found.outcomes:
        seconds = [slowdown if one.job.peer == "superpipe" else 1.0] * 3
        report = {**one.report, "step_seconds": seconds} if "step_seconds" in one.report else one.report
        outcomes.append(replace(one, report=report))
    return replace(found, label="Some GPU", emulated=False, outcomes=tuple(outcomes))


@pytest.mark.parametrize(("slowdown", "verdict"), [(2.0, "missed"), (1.04, "met")])
def test_figures_of_a_gpu_reach_the_first_page_without_the_emulations_verdict(
    slowdown: float, verdict: str, folder: Path, pages: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in STAGES:
        as_measured(stage(folder, name), slowdown).save(tmp_path / "gpu")
    assert publish_to(tmp_path / "gpu", pages) == 0
    text = pages[1].read_text()
    assert all((tmp_path / "gpu" / name).read_text().startswith("<?xml") for name in ("sweep.svg", "sweep-dark.svg"))
    assert text.startswith(f"before\n{publish.BEGIN}\n![") and "](gpu/sweep.svg)" in text
    assert "**Windows** (Some GPU)" in text and "**Copies between" not in text and "emulation" not in text
    assert "| tokens/s |" in text and "Speed is left out" not in text
    assert f"Goal: 60% saved at 95% of the resident throughput: {verdict} (k=" in text


def test_the_repositorys_first_page_has_a_place_and_no_figure_by_hand() -> None:
    inner = (ROOT / "README.md").read_text().split(publish.BEGIN)[1].split(publish.END)[0]
    found = [StageResult.load(path) for path in (ROOT / "experiments/gpu_proof/results").glob("*/sweep.json")]
    assert bool(inner.strip()) == any(not each.emulated for each in found)


def test_what_cannot_be_published_is_refused_with_a_way_out(
    folder: Path, pages: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_to(tmp_path / "nothing", pages) == 1
    assert "run prove.py" in capsys.readouterr().err
    stage(folder, "sweep").save(tmp_path / "mixed")
    replace(stage(folder, "peers"), label="another machine").save(tmp_path / "mixed")
    assert publish_to(tmp_path / "mixed", pages) == 1
    assert "its own folder" in capsys.readouterr().err
    pages[0].write_text("no markers")
    assert publish_to(folder, pages) == 1
    assert publish.BEGIN in capsys.readouterr().err
    (tmp_path / "mixed" / "sweep.json").write_text("{}")
    with pytest.raises(SuperpipeError, match="is no result of a stage"):
        load_results(tmp_path / "mixed", STAGES)


# -- single processes


def test_a_process_is_not_started_or_is_stopped_when_its_time_is_up(tmp_path: Path) -> None:
    watcher = Watcher("cpu", tmp_path)
    early = watcher.run(Job("train", "tiny", "cpu", peer="resident"), Deadline.after(1.0))
    assert (early.status, early.seconds) == (Status.LATE, 0.0)
    late = watcher.run(Job("train", "small", "cpu", peer="resident"), Deadline.after(5.5))
    assert late.status is Status.LATE and late.reason.startswith("stopped after")


def test_on_cuda_each_process_is_a_fresh_interpreter(tmp_path: Path) -> None:
    told = Watcher("cuda", tmp_path).run(Job("train", "tiny", "cuda", peer="resident"), Deadline.after(90))
    if torch.cuda.is_available():
        assert told.status is Status.OK and told.device_peak_bytes
    else:
        assert (told.status, told.reason) == (Status.REFUSED, "CannotRun: torch sees no CUDA device")


def test_a_process_that_fails_or_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher("cpu", tmp_path)
    failed = watcher.run(Job("no such task", "tiny", "cpu"), Deadline.after(60))
    assert (failed.status, failed.reason) == (Status.FAILED, "KeyError: 'no such task'")
    capped = watcher.run(Job("train", "tiny", "cpu", peer="resident", cap_bytes=1), Deadline.after(60))
    assert capped.status is Status.REFUSED and "no device memory to cap" in capped.reason
    monkeypatch.setattr(tasks, "run", os.abort)  # takes no arguments: the process ends before it could tell anything
    died = watcher.run(Job("facts", "tiny", "cpu"), Deadline.after(60))
    assert died.status is Status.FAILED and died.reason.startswith("the process ended with 1")


def test_a_contender_refuses_what_it_is_not_made_for() -> None:
    for peer in ("accelerate_offload", "diffusers_groups"):
        if find_spec(import_module(f"{peers.__name__}.{peer}").PACKAGE) is not None:
            with pytest.raises(CannotRun, match="inference"):
                peers.prepare(Job("train", "tiny", "cpu", peer=peer), torch.device("cpu"))


@pytest.mark.parametrize("name", ["job", "result", "sizes", "words", "tasks", "publish", "stages.headroom"])
def test_examples_in_docstrings_hold(name: str) -> None:
    found = doctest.testmod(import_module(f"experiments.gpu_proof.{name}"))
    assert found.attempted > 0 and found.failed == 0
