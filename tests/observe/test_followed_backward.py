"""Backward passes that somebody else starts are counted in their nodes, and nothing else changes."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

from lightning_superpipe import SuperpipeAccelerator, SuperpipeStrategy, attach
from lightning_superpipe.observe import LiveBytes
from tests.frontends.story import BATCH, CONTEXT, Story, make_model, texts

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, WIDTH = 64, 16


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x**2


class Network(nn.Module):
    """Blocks that are recomputed in one way or the other, and a loss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(4)
        )
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            recomputes = self.how in ("reentrant", "recomputed")
            x = checkpoint(block, x, use_reentrant=self.how == "reentrant") if recomputes else block(x)
            x = Cubed.apply(x) if self.how == "custom" else x  # type: ignore[no-untyped-call]
        return x.square().mean()


@pytest.mark.parametrize("how", ["kept", "recomputed", "reentrant", "custom"])
def test_a_followed_backward_is_counted_as_one_inside_the_mode(how: str) -> None:
    peaks, gradients = [], []
    for follows in (False, True):
        model, live = Network(how), LiveBytes("cpu")
        x = torch.ones(ROWS, WIDTH, requires_grad=True)
        one = torch.ones(())
        since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        with live:
            loss = model(x)
        if follows:
            live.follow({"loss": [loss]}, since)
            loss.backward(one)
        else:
            with live:
                loss.backward(one)
        peaks.append(live.peak_bytes)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert peaks[0] == peaks[1]
    assert all(map(torch.equal, *gradients))


def test_nodes_from_before_are_left_alone() -> None:
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    before = (2 * x).exp()
    since, live = torch.autograd._get_sequence_nr(), LiveBytes("cpu")  # type: ignore[attr-defined]
    live.follow(before.sum(), since)
    before.sum().backward()
    assert live.peak_bytes == 0


def test_an_error_in_backward_leaves_no_mode_behind() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            assert _len_torch_dispatch_stack() == 1  # the mode is on in here
            raise ValueError("of the test")

    live = LiveBytes("cpu")
    loss = Raises.apply(torch.ones(3, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
    live.follow(loss, 0)
    with pytest.raises(ValueError, match="of the test"):
        loss.backward()
    assert _len_torch_dispatch_stack() == 0
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


# -- what the front ends report


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model(Story(recompute=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loop(model: Any, backward: Any) -> None:
    for batch in texts(Story(num_steps=3)).split(BATCH):
        backward(model(input_ids=batch, labels=batch, use_cache=False).loss)
        model.zero_grad()


def test_loops_report_the_peak_that_lightning_reports() -> None:
    """Where the loss is the model's own; with recomputation most of the peak is made in backward."""
    strategy: Any = SuperpipeStrategy(k=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(texts(Story(num_steps=3)), batch_size=BATCH))  # type: ignore[arg-type]
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the last accelerator's precision
    accelerator = SuperpipeAccelerator(cpu=True, superpipe={"k": 2})
    loop(accelerator.prepare(make_model(Story(recompute=True))), accelerator.backward)
    with attach(make_model(Story(recompute=True)), k=2, device="cpu") as pipe:
        loop(pipe.model, Tensor.backward)
    expected, found = strategy.report(), pipe.report()
    assert abs(accelerator.report().peak.total - found.peak.total) <= 4  # the loss, which Accelerate divides
    assert 0 <= expected.peak.total - found.peak.total <= 2 * BATCH * CONTEXT * 8, "what holds the batch, in Lightning"
    assert expected.sees_loop and "outside the model" not in str(expected)
    assert not found.sees_loop and "outside the model" in str(found)
