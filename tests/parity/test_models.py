"""Real architectures train, validate, predict and generate as in the ordinary run, bit for bit."""

from __future__ import annotations

import pytest

from tests.parity.harness import ALL_UNITS, Window, assert_equal, placements, run_plain, run_streamed
from tests.parity.models import MODELS, NUM_BATCHES, model_case
from tests.parity.probe import Device, ParityCase

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS = (
    Window(1, 1),
    Window(2, 1, max_delay_ms=1.0),
    Window(3, 2),
    Window(3, 3),
    Window(ALL_UNITS, 2),
)


RECOMPUTE, OFFLOAD = Window(2, 1, 1.0, "recompute"), Window(3, 2, 1.0, "offload")
FEW_WINDOWS = (Window(2, 1), Window(3, 2, max_delay_ms=1.0))

PLAIN = [model_case(name) for name in MODELS]
FUSED = [model_case(name, fused=True) for name in ("gpt2", "llama_tied", "resnet")]
GENERATING = [model_case(name, generate=True) for name, spec in MODELS.items() if spec.generates]


@pytest.mark.parametrize(("case", "device", "window"), placements(PLAIN, WINDOWS))
def test_losses_weights_and_predictions_equal_the_ordinary_run(
    case: ParityCase, device: Device, window: Window
) -> None:
    reference, candidate = run_plain(case, device), run_streamed(case, device, window)
    assert len(reference.losses) == NUM_BATCHES
    assert candidate.num_loads, "nothing was streamed"
    assert_equal(reference, candidate)


@pytest.mark.parametrize(
    ("case", "device", "window"),
    placements(PLAIN, [RECOMPUTE], ["emu"]) + placements(PLAIN[::3], [OFFLOAD], ["emu"]),
)
def test_models_equal_the_ordinary_run_whatever_becomes_of_activations(
    case: ParityCase, device: Device, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_superpipe.engine.offload.MIN_BYTES", 1)
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize(("case", "device", "window"), placements(FUSED, [Window(2, 1)]))
def test_fused_updates_equal_the_ordinary_run(case: ParityCase, device: Device, window: Window) -> None:
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize(("case", "device", "window"), placements(GENERATING, FEW_WINDOWS))
def test_generated_text_equals_the_ordinary_run(case: ParityCase, device: Device, window: Window) -> None:
    reference = run_plain(case, device)
    assert {"greedy", "beams", "sampled"} <= {name for name, _ in reference.extra}
    assert_equal(reference, run_streamed(case, device, window))
