"""Weights and optimizer states in files leave what the ordinary run leaves, bit for bit: every probe, in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.harness import Window, assert_equal, placements, run_plain, run_streamed
from tests.parity.models import MODELS, model_case
from tests.parity.probe import Device, ParityCase
from tests.parity.test_probes import EXACT, OF_SAVING, OTHERWISE
from tests.parity.test_resume import resume, tensors, write

pytestmark = pytest.mark.filterwarnings("ignore")

PROBED = Window(3, 2, max_delay_ms=1.0, store="disk")
# Without a delay device and host are one memory: slots trade theirs with the buffers that files are read into.
TRADED = Window(2, 1, store="disk")
MODES = [Window(2, 1, 1.0, activations, store="disk") for activations in ("keep", "recompute", "offload")]
# One of each kind: decoder, tied head, encoder-decoder, convolutions with BatchNorm.
SOME_MODELS = [model_case(name) for name in ("gpt2", "llama_tied", "t5", "resnet") if name in MODELS]
# Compilers see no files, and take long.
PROBES = [case for case in EXACT if "cases_compiled" not in getattr(case.module, "__module__", "")]
OF_SOME_PROBES = [
    case for case in EXACT[::4] if getattr(case.module, "__module__", "") in OF_SAVING and case.name not in OTHERWISE
]


@pytest.mark.parametrize(("case", "device", "window"), placements(PROBES, [PROBED], ["emu"]))
def test_probe_equals_the_ordinary_run_with_files(case: ParityCase, device: Device, window: Window) -> None:
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize(("case", "device", "window"), placements(PROBES, [TRADED], ["cpu"]))
def test_probe_equals_the_ordinary_run_with_files_and_one_memory(
    case: ParityCase, device: Device, window: Window
) -> None:
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize(
    ("case", "device", "window"),
    [*placements(SOME_MODELS, MODES, ["emu"]), *placements(OF_SOME_PROBES, MODES[1:], ["emu"])],
)
def test_models_equal_the_ordinary_run_with_files_whatever_becomes_of_activations(
    case: ParityCase, device: Device, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_superpipe.engine.offload.MIN_BYTES", 1)
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_checkpoints_are_exchangeable_between_files_and_memory(device: Device, tmp_path: Path) -> None:
    plain = tensors(write(device, tmp_path / "plain.ckpt", stream=False))
    stored = tensors(write(device, tmp_path / "stored.ckpt", stream=True, window=PROBED))
    assert list(plain) == list(stored)
    assert [name for name in plain if not plain[name].equal(stored[name])] == []
    reference = resume(device, tmp_path / "plain.ckpt", stream=False)
    assert_equal(reference, resume(device, tmp_path / "plain.ckpt", stream=True, window=PROBED))
    assert_equal(reference, resume(device, tmp_path / "stored.ckpt", stream=True, window=PROBED))
    assert_equal(reference, resume(device, tmp_path / "stored.ckpt", stream=False))
