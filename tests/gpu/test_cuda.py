"""What only a GPU can show: streams, page-locked copies, CUDA kernels. All else is proved on emulated devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_superpipe import Adversary, SuperpipeStrategy

pytestmark = pytest.mark.gpu

WIDTH = 64


class Block(nn.Module):
    """Little compute over much memory: copies lose every race that a fence does not win for them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 64 * WIDTH)
        self.down = nn.Linear(64 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Module(L.LightningModule):
    """Blocks between an embedding and a tied head, with BatchNorm statistics on the way."""

    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.losses: list[Tensor] = []
        self.allocated: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.statistics(x))
        return result

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch).pow(2).mean()
        self.losses.append(loss.detach())
        self.allocated.append(torch.cuda.memory_allocated())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(self(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # One kernel for both runs: SGD without momentum rounds alike on host and device.
        return torch.optim.SGD(self.parameters(), lr=1e-2, foreach=False)


def run(strategy: Any, *, num_steps: int = 8, **options: Any) -> Module:
    L.seed_everything(0, verbose=False)
    module = Module()
    data = DataLoader(torch.randn(4 * num_steps, WIDTH, generator=torch.Generator().manual_seed(1)), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(
        accelerator="gpu", devices=1, strategy=strategy, max_epochs=1, num_sanity_val_steps=1, **{**quiet, **options}
    ).fit(module, data, data)
    return module


def tensors(module: Module) -> list[Tensor]:
    return [*(loss.cpu() for loss in module.losses), *(value.cpu() for value in module.state_dict().values())]


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (3, 2), (99, 1)])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}])
def test_streaming_on_cuda_equals_the_ordinary_run(k: int, k_prime: int, options: dict[str, Any]) -> None:
    reference = tensors(run(SingleDeviceStrategy("cuda:0"), **options))
    candidate = tensors(run(SuperpipeStrategy(k=k, k_prime=k_prime, adversary=Adversary()), **options))
    worst = max(float((one - other).abs().max()) for one, other in zip(reference, candidate, strict=True))
    # Losses of the first step are bit-equal; the update runs on the host, whose fused multiply-add may round otherwise.
    assert torch.equal(reference[0], candidate[0])
    assert worst <= 1e-6


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_precision_plugins_train_on_cuda(precision: Any) -> None:
    module = run(SuperpipeStrategy(k=2), precision=precision)
    assert all(torch.isfinite(loss) for loss in module.losses)
    assert not torch.equal(module.blocks[0].up.weight, Module().blocks[0].up.weight)


def test_device_memory_is_flat_over_200_steps() -> None:
    module = run(SuperpipeStrategy(k=2), num_steps=200)
    assert len(set(module.allocated[20:])) == 1


def test_nothing_is_left_on_the_device() -> None:
    before = torch.cuda.memory_allocated()
    strategy = SuperpipeStrategy(k=3)
    module = run(strategy)
    peak = strategy.report().peak_device_bytes
    module.losses.clear()
    assert torch.cuda.memory_allocated() == before
    assert 0 < peak < sum(parameter.nbytes for parameter in module.parameters())


def test_copies_come_from_page_locked_memory() -> None:
    seen: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(all(parameter.is_pinned() for parameter in pl_module.blocks.parameters()))

    run(SuperpipeStrategy(k=2), callbacks=[Look()])
    assert seen and all(seen)
