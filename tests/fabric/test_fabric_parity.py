"""The same loop through Fabric with the ordinary strategy and with ours leaves the same losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_superpipe import Adversary, FabricSuperpipeStrategy
from lightning_superpipe.errors import SuperpipeError, UnsupportedError

WIDTH = 16


class Net(nn.Module):
    """Blocks with dropout and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.linear(x, self.embed.weight)


def run(fabric: Fabric, folder: Path, *, apart: bool = False) -> list[Tensor]:
    """Train with accumulation, clipping, a save and a load in the middle; return losses and weights."""
    torch.manual_seed(0)
    net = Net()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=1e-2)
    model: Any
    if apart:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(optimizer)
    else:
        model, optimizer = fabric.setup(net, optimizer)
    losses = []
    for step in range(6):
        for micro in range(2):
            batch = fabric.to_device(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + micro)))
            loss = model(batch).pow(2).mean()
            fabric.backward(loss)
            losses.append(loss.detach().cpu())
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            fabric.save(folder / "state.ckpt", {"model": model, "optimizer": optimizer})
        if step == 3:
            fabric.load(folder / "state.ckpt", {"model": model, "optimizer": optimizer})
    model.eval()
    with torch.no_grad():
        losses.append(model(fabric.to_device(torch.ones(2, WIDTH))).cpu())
    return [*losses, *(weight.detach().cpu().clone() for weight in net.state_dict().values())]


def streamed(device: str, k: int) -> Fabric:
    strategy = FabricSuperpipeStrategy(k=k, adversary=Adversary(max_delay_ms=1.0))
    return Fabric(accelerator=accelerator(device), devices=1, strategy=strategy)


def ordinary(device: str) -> Fabric:
    strategy = SingleDeviceStrategy("emu:0" if device == "emu" else "cpu")
    return Fabric(accelerator=accelerator(device), devices=1, strategy=strategy)


def accelerator(device: str) -> Any:
    if device == "cpu":
        return "cpu"
    from tests.emu import EmuAccelerator

    return EmuAccelerator()


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("apart", [False, True])
def test_fabric_loop_equals_the_ordinary_one(device: str, k: int, apart: bool, tmp_path: Path) -> None:
    reference = run(ordinary(device), tmp_path, apart=apart)
    candidate = run(streamed(device, k), tmp_path, apart=apart)
    assert len(reference) == len(candidate)
    assert all(torch.equal(one, other) for one, other in zip(reference, candidate, strict=True))


def test_checkpoints_have_the_ordinary_keys(tmp_path: Path) -> None:
    run(streamed("cpu", 2), tmp_path)
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert set(saved["model"]) == set(Net().state_dict())


def test_strategy_by_name_and_report() -> None:
    import lightning_superpipe  # noqa: F401  # registers the name

    fabric = Fabric(accelerator="cpu", devices=1, strategy="superpipe")
    strategy: Any = fabric.strategy
    with pytest.raises(SuperpipeError, match="0 were set up"):
        strategy.report()
    model = fabric.setup(Net())
    model(torch.ones(1, WIDTH))
    assert strategy.report().num_loads > 0
    strategy.teardown()


def test_several_devices_are_refused() -> None:
    strategy = FabricSuperpipeStrategy(k=2, parallel_devices=[torch.device("cpu")] * 2)
    with pytest.raises(UnsupportedError, match="devices=1"):
        strategy.setup_environment()
