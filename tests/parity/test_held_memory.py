"""What stays on the device: equality cannot see a weight or an activation that is held too long."""

from __future__ import annotations

import gc
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tests.parity.harness import Window, streamed, trainer
from tests.parity.probe import Block, ProbeModule, fixed_batches

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.emu]

NUM_BLOCKS = 8
WINDOW = Window(2, 1)


class Held(ProbeModule):
    """Records the device bytes in use when forward has ended and the loss is alive."""

    width = 128
    num_rows = 1

    def build(self) -> None:
        self.embed = nn.Linear(self.embed.in_features, self.width)
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(self.width, 2)
        self.held_bytes: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        from tests.emu import used_bytes

        loss = self.loss(batch[:1].repeat(self.num_rows, 1))
        self.held_bytes.append(used_bytes())
        return loss

    def val_dataloader(self) -> Any:
        return []


class MovedByUser(Held):
    """Asks for all weights on the device."""

    def on_train_start(self) -> None:
        self.to(self.device)


class ManyRows(Held):
    """So many rows that activations are most of the memory."""

    num_rows = 128


class Checkpointed(ManyRows):
    """Keeps only the input of each block."""

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointedTogether(ManyRows):
    """Keeps only the inputs of two spans of blocks."""

    def span(self, x: Tensor, first: int) -> Tensor:
        for block in list(self.blocks)[first : first + NUM_BLOCKS // 2]:
            x = block(x)
        return x

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for first in (0, NUM_BLOCKS // 2):
            x = checkpoint(self.span, x, first, use_reentrant=False)
        return x


class SelfCheckpointing(Block):
    """Checkpoints its own inside."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(super().forward, x, use_reentrant=False))


class CheckpointedInside(ManyRows):
    """Each unit checkpoints itself: our hooks around the call must not keep what it lets go."""

    def build(self) -> None:
        super().build()
        self.blocks = nn.ModuleList(SelfCheckpointing(self.width) for _ in range(NUM_BLOCKS))


class SavedOnHost(ManyRows):
    """Moves all saved tensors to the host."""

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return super().forward(x)


def held_bytes(kind: type[Held], *, stream: bool = True) -> int:
    """Return the most device bytes held at the end of any forward, above what was in use before the fit."""
    from tests.emu import used_bytes

    gc.collect()
    base = used_bytes()
    L.seed_everything(0, verbose=False)
    module = kind()
    trainer("emu", streamed(WINDOW) if stream else None, max_epochs=1).fit(module, fixed_batches(3))
    return max(module.held_bytes) - base


@pytest.mark.parametrize("kind", [Held, MovedByUser])
def test_window_is_all_that_is_held_after_forward(kind: type[Held]) -> None:
    unit_bytes = sum(parameter.nbytes for parameter in Block(Held.width).parameters())
    held = held_bytes(kind)
    assert held < (WINDOW.k + 0.5) * unit_bytes, f"{held / unit_bytes:.1f} units are held after forward"
    assert held_bytes(kind, stream=False) > NUM_BLOCKS * unit_bytes


@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedTogether, CheckpointedInside, SavedOnHost])
def test_users_activation_saving_still_saves_when_streamed(kind: type[Held]) -> None:
    everything = held_bytes(ManyRows)
    assert held_bytes(kind) < 0.5 * everything


class Fails(Held):
    """Ends the run at some point of its second step."""

    where = ""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        from tests.emu import set_capacity, used_bytes

        if batch_idx < 1:
            return super().training_step(batch, batch_idx)
        if self.where == "forward":
            set_capacity(used_bytes() + 20_000)
        loss = self.loss(batch)
        if self.where == "backward":
            set_capacity(used_bytes() + 2_000)
        elif self.where == "between":
            raise ValueError("raised by the test")
        return loss


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
def test_nothing_is_held_after_a_failed_fit(where: str) -> None:
    from tests.emu import set_capacity, used_bytes

    gc.collect()
    base = used_bytes()
    L.seed_everything(0, verbose=False)
    module = Fails()
    module.where = where
    run = trainer("emu", streamed(WINDOW), max_epochs=1)
    try:
        run.fit(module, fixed_batches(3))
        failed = False
    except (torch.OutOfMemoryError, ValueError):
        failed = True
    finally:
        set_capacity(None)
    assert failed
    del run
    module.trainer = None  # the loops of an ordinary Trainer hold the last batch
    gc.collect()
    assert used_bytes() == base, "the module is alive, but nothing of it belongs on the device any more"


def test_nothing_is_held_after_an_ordinary_end() -> None:
    from tests.emu import used_bytes

    gc.collect()
    base = used_bytes()
    module = Held()
    run = trainer("emu", streamed(WINDOW), max_epochs=1)
    run.fit(module, fixed_batches(3))
    gc.collect()
    assert used_bytes() == base
