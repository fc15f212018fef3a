"""A deep GPT on a device that counts its bytes: the window is what it costs, and what does not fit is refused."""

from __future__ import annotations

import gc
import re
import time
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.engine.layout import slot_bytes_of
from lightning_superpipe.errors import BudgetError
from tests.emu import capacity, peak_bytes, reset_peak, used_bytes
from tests.parity.harness import trainer

pytestmark = [
    pytest.mark.emu,
    pytest.mark.usefixtures("emu", "gradients_land_at_once"),
    pytest.mark.filterwarnings("ignore"),
]

DEEP, SHALLOW = 24, 5
WIDTH, NUM_ROWS, NUM_TOKENS, NUM_STEPS = 128, 2, 4, 2


class Gpt(L.LightningModule):
    """A GPT-2 from its configuration."""

    def __init__(self, num_blocks: int, *, checkpoints: bool) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": num_blocks, "n_embd": WIDTH, "n_head": 2, "vocab_size": 512, "n_positions": 32}
        options: dict[str, Any] = {**sizes, "use_cache": False, "attn_implementation": "eager"}
        self.net: Any = GPT2LMHeadModel(GPT2Config(**options))
        if checkpoints:
            enable: Any = self.net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)


class Fit(NamedTuple):
    """What a fit cost, and what it computed."""

    peak_bytes: int
    left_bytes: int
    losses: list[float]
    weights: list[Tensor]


def batches() -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 512, (NUM_ROWS, NUM_TOKENS), generator=generator) for _ in range(NUM_STEPS)]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


def fit(strategy: Strategy | None, num_blocks: int = SHALLOW, *, checkpoints: bool = True) -> Fit:
    """Train from the same start; ``None`` is the ordinary strategy of the device."""
    L.seed_everything(0, verbose=False)
    module = Gpt(num_blocks, checkpoints=checkpoints)
    gc.collect()
    base = used_bytes()
    reset_peak()
    trainer("emu", strategy, max_epochs=1).fit(module, batches())
    peak = peak_bytes() - base
    gc.collect()
    left = used_bytes() - base if strategy is not None else 0  # the ordinary run leaves the model there
    return Fit(peak, left, module.losses, [parameter.detach().cpu() for parameter in module.parameters()])


@cache
def streamed(k: int) -> Fit:
    """Return a fit of the shallow model."""
    return fit(SuperpipeStrategy(k=k))


@pytest.mark.parametrize("checkpoints", [False, True], ids=["keep", "checkpoint"])
def test_two_slots_take_at_least_85_percent_less_than_the_ordinary_run(checkpoints: bool) -> None:
    reference = fit(None, DEEP, checkpoints=checkpoints)
    candidate = fit(SuperpipeStrategy(k=2), DEEP, checkpoints=checkpoints)
    sizes = f"{candidate.peak_bytes / 2**20:.2f} of {reference.peak_bytes / 2**20:.2f} MiB"
    assert candidate.peak_bytes < 0.15 * reference.peak_bytes, sizes
    assert candidate.losses == reference.losses
    assert all(map(torch.equal, candidate.weights, reference.weights))
    assert candidate.left_bytes == 0


def test_one_more_slot_costs_exactly_one_slot() -> None:
    slot_bytes = slot_bytes_of(Gpt(1, checkpoints=False).net.transformer.h[0], ())
    peaks = [streamed(k).peak_bytes for k in (1, 2, 3, 4)]
    assert [more - less for less, more in pairwise(peaks)] == [slot_bytes] * 3


def test_more_slots_and_kept_activations_cost_more_and_all_less_than_the_ordinary_run() -> None:
    peaks = [streamed(k).peak_bytes for k in (1, 2, 3, 4)]
    assert sorted(set(peaks)) == peaks
    keeps = fit(SuperpipeStrategy(k=4), checkpoints=False)
    assert peaks[-1] < keeps.peak_bytes < fit(None, checkpoints=False).peak_bytes


def test_gradients_on_their_way_take_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # they travel beside backward again
    slot_bytes = slot_bytes_of(Gpt(1, checkpoints=False).net.transformer.h[0], ())
    extra = fit(SuperpipeStrategy(k=2)).peak_bytes - streamed(2).peak_bytes
    assert 0 <= extra <= 2 * slot_bytes


def test_nothing_is_left_on_the_device() -> None:
    assert [streamed(k).left_bytes for k in (1, 2, 3, 4)] == [0] * 4


def test_fit_runs_in_what_it_needs_and_in_no_less() -> None:
    needed = streamed(2)
    base = used_bytes()
    with capacity(base + needed.peak_bytes):
        again = fit(SuperpipeStrategy(k=2))
    assert (again.losses, again.peak_bytes) == (needed.losses, needed.peak_bytes)
    with capacity(base + needed.peak_bytes - 1), pytest.raises(torch.OutOfMemoryError):
        fit(SuperpipeStrategy(k=2))
    time.sleep(0.1)
    gc.collect()
    assert used_bytes() == base


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_fit_after_a_fit_that_ran_out_of_memory_is_exact(share: float) -> None:
    needed = streamed(2)
    base = used_bytes()
    strategy = SuperpipeStrategy(k=2)
    with capacity(base + int(share * needed.peak_bytes)), pytest.raises(torch.OutOfMemoryError):
        fit(strategy)
    time.sleep(0.1)  # autograd's thread lets go of a graph a moment after the error has reached us
    gc.collect()
    assert used_bytes() - base in (0, NUM_ROWS * NUM_TOKENS * 8), "the trainer, still alive, may hold the last batch"
    del strategy
    gc.collect()
    assert used_bytes() == base
    assert fit(SuperpipeStrategy(k=2)).losses == needed.losses


def test_budget_is_refused_before_anything_runs_and_the_one_it_asks_for_is_not() -> None:
    with pytest.raises(BudgetError) as refusal:
        fit(SuperpipeStrategy(k=2, device_memory=1000))
    needed = re.search(r"needs .*?\((\d+) bytes\)", str(refusal.value))
    assert needed is not None, str(refusal.value)
    base = used_bytes()
    with pytest.raises(BudgetError, match="Use k<=1"):
        fit(SuperpipeStrategy(k=2, device_memory=int(needed[1]) - 1))
    assert used_bytes() == base
    assert fit(SuperpipeStrategy(k=2, device_memory=int(needed[1]))).losses == streamed(2).losses
