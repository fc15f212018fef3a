"""Bytes on the device and page-locked bytes beside it: flat, bounded, given back."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.tiers import HostTier
from tests.gpu.places import CUDA, Place, on_both
from tests.parity.harness import Window, streamed, trainer
from tests.parity.probe import Block, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOW = Window(2, 1)
NUM_BLOCKS, WIDTH = 8, 128
MIB = 1 << 20
UNIT_BYTES = sum(parameter.nbytes for parameter in Block(WIDTH).parameters())


class Deep(ProbeModule):
    """Notes the bytes on the device before and after each forward."""

    def build(self) -> None:
        self.embed = nn.Linear(self.embed.in_features, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, 2)
        self.place: Place = CUDA
        self.before_bytes: list[int] = []
        self.held_bytes: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.before_bytes.append(self.place.held_bytes())
        loss = self.loss(batch)
        self.held_bytes.append(self.place.held_bytes())
        return loss

    def val_dataloader(self) -> Any:
        return []


def fit(kind: type[Deep], place: Place, strategy: Any, *, num_steps: int = 3, **options: Any) -> Deep:
    L.seed_everything(0, verbose=False)
    module = kind()
    module.place = place
    trainer(place.name, strategy, max_epochs=1, **options).fit(module, fixed_batches(num_steps))
    return module


@on_both
def test_device_memory_is_flat_over_200_steps(place: Place) -> None:
    module = fit(Deep, place, SuperpipeStrategy(k=2), num_steps=200)
    assert len(module.before_bytes) == 200
    # Gradients on their way home may still be there when a step begins: two units' at most, and not more and more.
    settled = module.before_bytes[20:]
    assert max(settled) - min(settled) <= 2 * UNIT_BYTES
    assert max(settled[90:]) <= max(settled[:90])


@on_both
def test_the_window_is_all_that_is_held_after_forward(place: Place) -> None:
    base = place.used_bytes()
    module = fit(Deep, place, streamed(WINDOW))
    held = max(module.held_bytes) - base
    assert held < (WINDOW.k + 0.75) * UNIT_BYTES, f"{held / UNIT_BYTES:.1f} units are held"
    whole = max(fit(Deep, place, None).held_bytes) - base
    assert whole > NUM_BLOCKS * UNIT_BYTES


@on_both
def test_casts_of_weights_are_not_held_under_autocast(place: Place) -> None:
    """Autocast would keep half-precision copies of all units until backward: half as much again as the weights."""
    base = place.used_bytes()
    plugin = MixedPrecision("bf16-mixed", place.name)
    module = fit(Deep, place, streamed(WINDOW), plugins=[plugin])
    held = max(module.held_bytes) - base
    assert held < (WINDOW.k + 1.25) * UNIT_BYTES, f"{held / UNIT_BYTES:.1f} units are held"


@on_both
def test_nothing_is_on_the_device_after_an_ordinary_end(place: Place) -> None:
    base = place.used_bytes()
    strategy = SuperpipeStrategy(k=3)
    module = fit(Deep, place, strategy)
    assert place.used_bytes() == base
    assert 0 < strategy.report().peak_device_bytes < sum(parameter.nbytes for parameter in module.parameters())


class Grabs(Deep):
    """Asks for more memory than there is, in the second step."""

    where = "forward"
    too_much = 0

    def loss(self, x: Tensor) -> Tensor:
        loss = super().loss(x)
        if len(self.before_bytes) < 2:
            return loss
        if self.where == "forward":
            torch.empty(self.too_much, dtype=torch.uint8, device=x.device)
        loss.register_hook(self.grab)
        return loss

    def grab(self, gradient: Tensor) -> None:
        torch.empty(self.too_much, dtype=torch.uint8, device=gradient.device)


class GrabsInBackward(Grabs):
    """Asks for it while gradients are on their way home."""

    where = "backward"

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == NUM_BLOCKS // 2 and len(self.before_bytes) == 2:
                x.register_hook(self.grab)
        return x

    def loss(self, x: Tensor) -> Tensor:
        return ProbeModule.loss(self, x)


@on_both
@pytest.mark.parametrize("kind", [Grabs, GrabsInBackward])
def test_nothing_is_held_after_a_fit_that_ran_out_of_memory(kind: type[Grabs], place: Place) -> None:
    base = place.used_bytes()
    limit = base + 256 * MIB
    module = kind()
    module.place, module.too_much = place, 2 * limit
    run = trainer(place.name, streamed(WINDOW), max_epochs=1)
    with place.capped(limit), pytest.raises(torch.OutOfMemoryError):
        run.fit(module, fixed_batches(3))
    del run
    module.trainer = None  # the loops of an ordinary Trainer hold the last batch
    gc.collect()
    assert place.used_bytes() == base, "the module is alive, but nothing of it belongs on the device any more"
    again = fit(Deep, place, SuperpipeStrategy(k=2))
    assert all(parameter.isfinite().all() for parameter in again.parameters())


@pytest.mark.parametrize("pin", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["pageable", "page-locked"])
def test_slabs_take_their_size_and_no_power_of_two(pin: bool) -> None:
    """``pin_memory()`` rounds 129 MiB up to 256."""
    num_bytes, process = 129 * MIB, psutil.Process()
    tier = HostTier(pin=pin)
    before = process.memory_info().rss
    slab = tier.allocate(num_bytes)
    slab.bytes.fill_(1)
    grown = process.memory_info().rss - before
    assert (slab.pinned, slab.bytes.numel(), tier.allocated_bytes) == (pin, num_bytes, num_bytes)
    assert slab.bytes.is_pinned() is pin
    assert num_bytes - 4 * MIB <= grown < 1.1 * num_bytes
    tier.close()
    assert (slab.pinned, tier.allocated_bytes) == (False, 0)


@pytest.mark.gpu
def test_weights_are_page_locked_while_they_stream_and_not_afterwards() -> None:
    seen: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(all(parameter.is_pinned() for parameter in pl_module.blocks.parameters()))

    module = fit(Deep, CUDA, SuperpipeStrategy(k=2), callbacks=[Look()])
    assert seen and all(seen)
    assert not any(parameter.is_pinned() for parameter in module.parameters())
