"""``superpipe profile`` and ``superpipe plan``: measured and predicted before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lightning_superpipe.app.main import main
from lightning_superpipe.app.words import overrides_of
from lightning_superpipe.forecast.machine import kept_profile
from lightning_superpipe.observe import MachineProfile, shipped_names
from lightning_superpipe.observe.profiles import CACHE_VARIABLE
from tests.app.conftest import Ran
from tests.app.test_modes import UNITS

Command = Callable[..., Ran]

LARGE = ["model=byte_gpt", "model.config.n_layer=32", "model.config.n_embd=4096", "model.config.n_head=32"]


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``superpipe profile`` with words; return status, output and complaints."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["superpipe"])
        status = main(["profile", *words])
        return status, *capsys.readouterr()

    return run


def test_profile_prints_keeps_and_writes_what_it_measured(
    profile: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    status, out, _ = profile("device=cpu", f"disk={tmp_path}", f"output={tmp_path / 'mine.json'}")
    assert status == 0
    written = MachineProfile.load(tmp_path / "mine.json")
    assert kept_profile("cpu") == written
    assert written.disks and written.computes and written.memory and written.updates and written.copies
    for words in ("Copies between host and device, GB/s", "AdamW on the host", "float32 products", "emulated"):
        assert words in out
    status, out, _ = profile("--device", "cpu", "--output", str(tmp_path / "again.json"))
    assert (status, MachineProfile.load(tmp_path / "again.json")) == (0, written), "the one that was kept"
    assert profile("device=cpu", "--again")[0] == 0
    assert kept_profile("cpu") != written


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["dsk=/tmp"], "did you mean 'disk'"),
        (["disk"], "disk needs a value"),
        (["device=tpu9"], "not a device of this machine"),
    ],
)
def test_a_word_that_profile_does_not_know_is_refused(
    profile: Callable[..., tuple[int, str, str]], words: list[str], complaint: str
) -> None:
    status, out, err = profile(*words)
    assert (status, out) == (1, "") and complaint in err


def test_a_profile_that_cannot_be_written_is_said(profile: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = profile("device=cpu", f"output={tmp_path / 'nowhere' / 'x.json'}")
    assert status == 1 and "cannot be written" in err


def test_plan_predicts_for_a_machine_by_name(superpipe: Command) -> None:
    ran = superpipe("plan", "experiment=tiny", "k=2", "+data.batch_size=6", "device=cpu-2cores")
    assert ran.status == 0
    assert [unit for unit in UNITS if unit not in ran.out] == []
    assert "k=2: as asked" in ran.out and "<- chosen" in ran.out and "samples/s" in ran.out
    assert "  6 x " in ran.out, "the batch that was asked for"
    assert ran.rows == [] and not (ran.folder / "checkpoints").exists()


def test_plan_shows_a_table_of_windows_where_k_is_open(superpipe: Command) -> None:
    ran = superpipe("plan", "experiment=tiny", "k=auto", "device=cpu-2cores", "superpipe.device_memory=1MiB")
    assert ran.status == 0
    rows = [line.split()[:2] for line in ran.out.splitlines() if line.rstrip().endswith(("ms", "us", "chosen", "fit"))]
    assert {("1", "1"), ("2", "1"), ("4", "1"), ("4", "2")} <= {tuple(row) for row in rows}
    assert ran.out.count("<- chosen") == 1


def test_plan_without_a_machine_names_those_there_are(
    superpipe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "empty"))
    ran = superpipe("plan", "experiment=tiny")
    assert ran.status == 0 and "Window: k=2" in ran.out
    assert all(name in ran.out for name in shipped_names()) and "superpipe profile" in ran.out


def test_plan_refuses_an_unknown_machine_with_the_nearest(superpipe: Command) -> None:
    assert "did you mean 'cpu-2cores'" in str(superpipe("plan", "experiment=tiny", "device=cpu-2core").status)


def test_plan_of_a_model_without_data_says_what_is_missing(superpipe: Command) -> None:
    said = str(superpipe("plan", "model=byte_gpt", "device=rtx4090-24g").status)
    assert "No data was chosen: add data=NAME" in said


def test_plan_with_a_file_that_is_no_profile_is_refused(superpipe: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{", encoding="utf-8")
    said = str(superpipe("plan", "experiment=tiny", f"device={tmp_path / 'mine.json'}").status)
    assert "is not a machine profile of this version" in said and "measure again" in said


def test_plan_says_what_the_host_lacks(superpipe: Command) -> None:
    ran = superpipe("plan", "experiment=tiny", "device=cpu-2cores", "+superpipe.host_memory=1KiB")
    assert "host_memory allows 1.0 KiB" in f"{ran.status} {ran.out}"


def test_plan_says_that_everything_fits(superpipe: Command) -> None:
    wanted = ("plan", "experiment=tiny", "k=auto", "device=cpu-2cores", "superpipe.device_memory=1GiB")
    ran = superpipe(*wanted)
    assert ran.status == 0
    assert "everything fits, so no unit leaves the device, as without streaming" in ran.out
    fits = r"All weights, gradients, optimizer states and activations fit .* of 1\.0 GiB: after its first steps"
    assert re.search(fits, ran.out)
    for kept in ("superpipe.step_aside=false", "superpipe.resident=0", "superpipe.master_weights=float32"):
        again = superpipe(
            "plan", "experiment=tiny", "k=auto", "device=cpu-2cores", "superpipe.device_memory=1GiB", kept
        )
        assert again.status == 0 and not re.search(fits, again.out)


def test_a_model_of_billions_is_planned_without_its_memory(superpipe: Command) -> None:
    before = psutil.Process().memory_info().rss
    ran = superpipe("plan", *LARGE, "data=source_code", "device=rtx4090-24g", "machine=gpu", "batch_size=2")
    assert ran.status == 0, ran.status
    assert "NVIDIA GeForce RTX 4090" in ran.out and "Published measurements, not ours" in ran.out
    assert "<- chosen" in ran.out
    assert psutil.Process().memory_info().rss - before < 2 << 30


def test_short_words_stand_for_their_keys() -> None:
    assert overrides_of(["plan", "k=3", "k_prime=2", "batch_size=8", "data.batch_size=4"]) == [
        *("mode=plan", "superpipe.k=3", "superpipe.k_prime=2", "data.batch_size=8", "data.batch_size=4")
    ]
