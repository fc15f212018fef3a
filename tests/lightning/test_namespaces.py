"""The strategy by name and as an object, in `lightning` and in `pytorch_lightning`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn

import lightning_superpipe
from lightning_superpipe import SuperpipeConfig, SuperpipeStrategy
from tests.parity.probe import ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_the_name_gives_a_strategy_with_the_defaults() -> None:
    torch.manual_seed(0)
    reference = ProbeModule()
    L.Trainer(accelerator="cpu", max_epochs=2, **QUIET).fit(reference)
    torch.manual_seed(0)
    module = ProbeModule()
    run = L.Trainer(strategy="superpipe", accelerator="cpu", max_epochs=2, **QUIET)
    run.fit(module)
    assert type(run.strategy) is SuperpipeStrategy
    assert run.strategy.config == SuperpipeConfig()
    assert run.strategy.report().num_loads > 0
    assert all(torch.equal(a, b) for a, b in zip(reference.losses, module.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), module.parameters(), strict=True))


def test_the_default_accelerator_works_too() -> None:
    run = L.Trainer(strategy="superpipe", devices=1, fast_dev_run=True, **QUIET)
    run.fit(ProbeModule())
    assert run.strategy.root_device == run.lightning_module.device


def test_importing_and_reloading_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = StrategyRegistry["superpipe"]["strategy"]
    importlib.reload(lightning_superpipe)
    name = "lightning_superpipe.adapters.lightning"
    monkeypatch.setattr(sys.modules["lightning_superpipe.adapters"], "lightning", sys.modules[name])
    monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module(name).SuperpipeStrategy is not before
    assert StrategyRegistry.available_strategies().count("superpipe") == 1
    assert StrategyRegistry["superpipe"]["strategy"] is before
    assert "host and device" in StrategyRegistry["superpipe"]["description"]


def test_options_may_be_given_one_by_one_or_as_a_config() -> None:
    config = SuperpipeConfig(k=3, k_prime=2)
    assert SuperpipeStrategy(k=3, k_prime=2).config == SuperpipeStrategy(config=config).config == config
    with pytest.raises(TypeError, match=r"config= or single options \(k\), not both"):
        SuperpipeStrategy(config=config, k=2)


def test_the_trainer_takes_it_for_a_single_device_strategy() -> None:
    run = L.Trainer(strategy=SuperpipeStrategy(), accelerator="cpu", **QUIET)
    assert (run.world_size, run.num_nodes, run.num_devices, run.global_rank) == (1, 1, 1, 0)
    assert run.is_global_zero and not run._accelerator_connector.is_distributed


OTHER_NAMESPACE = """
import sys
import torch
from torch import nn

{imports}

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch).pow(2).mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.layers(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

def run(strategy):
    torch.manual_seed(0)
    module = Module()
    data = torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=2)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", max_epochs=2, default_root_dir=sys.argv[1], **quiet)
    trainer.fit(module, data, data)
    trainer.validate(module, data, verbose=False)
    return module, trainer

from lightning_superpipe.pytorch_lightning import SuperpipeStrategy

reference, _ = run("auto")
for strategy in ("superpipe", SuperpipeStrategy(k=2)):
    module, trainer = run(strategy)
    assert isinstance(trainer.strategy, pl.strategies.SingleDeviceStrategy), type(trainer.strategy)
    assert trainer.strategy.report().num_loads > 0
    assert all(torch.equal(a, b) for a, b in zip(reference.losses, module.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), module.parameters(), strict=True))
    trainer.save_checkpoint(sys.argv[1] + "/a.ckpt")
    Module.load_from_checkpoint(sys.argv[1] + "/a.ckpt")
    trainer.fit_loop.max_epochs = 3
    data = torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=2)
    trainer.fit(module, data, ckpt_path=sys.argv[1] + "/a.ckpt")
    assert len(module.losses) == 12
print("same")
"""
WAYS = {
    "imported_before": "import pytorch_lightning as pl\nimport lightning_superpipe",
    "asked_for": (
        "import lightning_superpipe\nassert 'pytorch_lightning' not in sys.modules\n"
        "import lightning_superpipe.pytorch_lightning\nimport pytorch_lightning as pl"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_pytorch_lightning_trains_equally(way: str, tmp_path: Path) -> None:
    code = OTHER_NAMESPACE.format(imports=WAYS[way])
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["same"]), ran.stderr


class Plain(L.LightningModule):
    """A module without anything of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch).pow(2).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_modules_are_made_on_the_host() -> None:
    run = L.Trainer(strategy="superpipe", accelerator="cpu", fast_dev_run=True, **QUIET)
    with run.init_module():
        made = Plain()
    assert {parameter.device.type for parameter in made.parameters()} == {"cpu"}
    with run.init_module(empty_init=True):
        Plain()


@pytest.mark.emu
def test_modules_are_made_on_the_host_though_they_compute_elsewhere() -> None:
    from tests.emu import EmuAccelerator

    class Configured(Plain):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 4)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert self.device.type == "emu" and batch.device.type == "emu"
            loss: Tensor = self.late(self.layers(batch)).pow(2).mean()
            return loss

    strategy = SuperpipeStrategy(k=2)
    run = L.Trainer(strategy=strategy, accelerator=EmuAccelerator(), devices=1, max_epochs=1, **QUIET)
    with run.init_module():
        module = Configured()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    run.fit(module, torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2))  # type: ignore[arg-type]
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert strategy.root_device.type == "emu"
    assert {value.device.type for state in run.optimizers[0].state.values() for value in state.values()} <= {"cpu"}
