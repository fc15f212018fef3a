"""Device bytes under each policy, counted by the device: chains of inequalities, flat over steps, nothing left."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeWarning
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.session import Session
from tests.emu import peak_bytes, reset_peak, used_bytes
from tests.engine.tiny import CPU, Result, chain, is_equal, train

WIDTH, NUM_BLOCKS, NUM_ROWS = 32, 24, 512
INPUT_BYTES = 4 * WIDTH * NUM_ROWS


def inputs(device: torch.device, num_batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_ROWS, WIDTH, generator=generator).to(device) for _ in range(num_batches)]


@cache
def run(device: torch.device, activations: str, micro_batches: int = 1) -> tuple[int, Result, PeakBytes]:
    """Return the device's peak bytes (0 on the CPU), what training left, and the reported peak."""
    module = chain(NUM_BLOCKS, width=WIDTH)
    gc.collect()
    is_emulated = device.type == "emu"
    base = used_bytes() if is_emulated else 0
    if is_emulated:
        reset_peak()
    config = SuperpipeConfig(k=2, activations=activations, micro_batches=micro_batches)
    session = Session(module, config, device, trains=True, owns_root=True)
    left = train(module, inputs(device), lambda: session.step("train"))
    session.close()
    peak = peak_bytes() - base if is_emulated else 0
    gc.collect()
    assert not is_emulated or used_bytes() == base, "nothing is held after the end"
    return peak, left, session.report().peak


@pytest.mark.emu
def test_peaks_form_chains(emu: torch.device) -> None:
    keep, offload, recompute = (run(emu, policy)[0] for policy in ("keep", "offload", "recompute"))
    in_two, in_four = (run(emu, "recompute", parts)[0] for parts in (2, 4))
    assert keep > 4 * recompute > 4 * in_two > 4 * in_four > 4 * offload
    assert in_four > (NUM_BLOCKS - 1) * INPUT_BYTES, "the inputs of all units are what is left"


@pytest.mark.emu
def test_numbers_are_those_of_keeping(emu: torch.device) -> None:
    assert is_equal(run(emu, "offload")[1], run(emu, "keep")[1])
    assert is_equal(run(emu, "recompute")[1], run(emu, "keep")[1])
    # The second loss follows an update by gradients that were summed in another order.
    assert run(emu, "recompute", 4)[1].losses == pytest.approx(run(emu, "keep")[1].losses, rel=1e-4)


@pytest.mark.emu
@pytest.mark.parametrize("activations", ["offload", "recompute"])
def test_bytes_are_flat_over_steps(emu: torch.device, activations: str, gradients_land_at_once: None) -> None:
    module, after, peaks = chain(6, width=WIDTH), [], []
    config = SuperpipeConfig(k=2, activations=activations)
    session = Session(module, config, emu, trains=True, owns_root=True)
    (x,) = inputs(emu, 1)
    for _ in range(20):
        reset_peak()
        train(module, [x], lambda: session.step("train"))
        after.append(used_bytes())
        peaks.append(peak_bytes())
    session.close()
    assert len(set(after[2:])) == 1
    assert len(set(peaks[2:])) == 1


def test_report_counts_activations_under_each_policy() -> None:
    peaks = {policy: run(CPU, policy)[2].activations for policy in ("keep", "offload", "recompute")}
    assert peaks["keep"] > 2 * peaks["offload"]
    assert peaks["keep"] > 2 * peaks["recompute"]
    assert peaks["recompute"] > run(CPU, "recompute", 4)[2].activations


@pytest.mark.emu
def test_reported_peak_is_the_devices(emu: torch.device) -> None:
    """But for batches and losses, which are made outside the session."""
    for policy in ("keep", "offload", "recompute"):
        peak, _, reported = run(emu, policy)
        assert 0 <= peak - reported.total <= 5 * INPUT_BYTES + 64, policy


# -- auto


def automatic(device_memory: int | None) -> tuple[Result, PeakBytes]:
    module = chain(NUM_BLOCKS, width=WIDTH)
    config = SuperpipeConfig(k=2, device_memory=device_memory)
    session = Session(module, config, CPU, trains=True, owns_root=True)
    first = train(module, inputs(CPU, 1), lambda: session.step("train"))
    assert first.losses
    train(module, inputs(CPU, 1), lambda: session.step("train"))
    session._meter.peak = PeakBytes()  # of the first step, which keeps
    session._num_steps = 1  # so that the next is counted
    left = train(module, inputs(CPU, 1), lambda: session.step("train"))
    session.close()
    return left, session.report().peak


def test_auto_keeps_until_a_budget_is_exceeded_then_recomputes_exactly() -> None:
    with pytest.warns(SuperpipeWarning, match=r"activations took .* device_memory leaves .*: from now on .* recompute"):
        left, peak = automatic(2 * 2**20)
    expected, kept = automatic(None)
    assert is_equal(left, expected)
    assert peak.activations < kept.activations / 2


@pytest.mark.filterwarnings("error::lightning_superpipe.errors.SuperpipeWarning")
def test_auto_keeps_within_a_budget() -> None:
    assert automatic(2**30)[1].activations == automatic(None)[1].activations
