"""A checkpoint is Lightning's own file: it loads without this package, and holds nothing but what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.lightning.stories import WINDOW, Bench, assert_same, tensors
from tests.parity.probe import Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

DEVICES = ["cpu", pytest.param("emu", marks=pytest.mark.emu)]


class Kept(ProbeModule):
    """Has hyperparameters, a tied head, a batch norm and two schedulers' worth of state."""

    def __init__(self, width: int = 16, rate: float = 1e-2) -> None:
        self.rate = rate
        super().__init__()
        self.save_hyperparameters()

    def build(self) -> None:
        self.norm = nn.BatchNorm1d(self.embed.out_features)
        self.head = nn.Linear(self.embed.in_features, self.embed.out_features)
        self.head.weight = self.embed.weight

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(self.norm(x))

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def write(device: Device, path: Path, *, stream: bool, weights_only: bool = False) -> L.Trainer:
    """Train one epoch and a half, and save."""
    torch.manual_seed(0)
    run = Bench(device, WINDOW if stream else None).trainer(max_steps=6, max_epochs=-1)
    run.fit(Kept())
    run.save_checkpoint(path, weights_only=weights_only)
    return run


def without_tensors(value: Any) -> Any:
    """Return a nested value with each tensor replaced by its shape and dtype."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: without_tensors(each) for key, each in value.items()}
    return [without_tensors(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_streamed_run_writes_the_ordinary_file(weights_only: bool, device: Device, tmp_path: Path) -> None:
    held = []
    for stream in (False, True):
        path = tmp_path / f"{stream}.ckpt"
        write(device, path, stream=stream, weights_only=weights_only)
        held.append(torch.load(path, weights_only=True))  # the safe way of loading: no classes of ours inside
    assert without_tensors(held[0]) == without_tensors(held[1])  # loops, schedulers, hyperparameters, order of keys
    assert list(held[0]["state_dict"]) == list(held[1]["state_dict"])
    pairs = zip(tensors(held[0]).items(), tensors(held[1]).items(), strict=True)
    assert [name for (name, a), (_, b) in pairs if not torch.equal(a.cpu(), b)] == []
    assert ("optimizer_states" in held[1]) is not weights_only


@pytest.mark.parametrize("device", DEVICES)
def test_each_tensor_in_the_file_owns_its_storage(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "streamed.ckpt"
    write(device, path, stream=True)
    held = tensors(torch.load(path, weights_only=True))
    assert {tensor.device.type for tensor in held.values()} == {"cpu"}
    assert [name for name, tensor in held.items() if tensor.untyped_storage().nbytes() != tensor.nbytes] == []
    shared = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    assert len(held) - len(shared) == 1, "only the tied weight is there twice"


def test_a_streamed_file_is_as_large_as_the_ordinary_one(tmp_path: Path) -> None:
    for stream in (False, True):
        write("cpu", tmp_path / f"{stream}.ckpt", stream=stream)
    sizes = [(tmp_path / f"{stream}.ckpt").stat().st_size for stream in (False, True)]
    assert sizes[1] < 1.02 * sizes[0]


class LooksAtKeys(Callback):
    """Compares the state dict in every hook with the one before the run, and saves in mid-run."""

    def __init__(self, expected: list[str], path: Path) -> None:
        self.expected, self.path = expected, path
        self.num_looks = 0

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        state = pl_module.state_dict()
        assert list(state) == self.expected
        assert all(value.device.type == "cpu" for value in state.values())
        assert [name for name, _ in pl_module.named_parameters()] == [n for n in self.expected if n in self.parameters]
        self.num_looks += 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.parameters = {name for name, _ in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._look(trainer, pl_module)
        trainer.save_checkpoint(self.path)

    on_train_start = on_after_backward = on_train_batch_end = on_validation_batch_end = on_fit_end = _look  # type: ignore[assignment]


@pytest.mark.parametrize("device", DEVICES)
def test_state_dict_keys_are_the_same_at_every_moment(device: Device, tmp_path: Path) -> None:
    module = Kept()
    looks = LooksAtKeys(list(module.state_dict()), tmp_path / "mid.ckpt")
    Bench(device, WINDOW).trainer(callbacks=[looks], max_epochs=1).fit(module)
    assert looks.num_looks > 10
    held = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert list(held["state_dict"]) == looks.expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("written", "read"), [(True, True), (True, False), (False, True)])
def test_resuming_in_mid_epoch_is_the_same_however_it_was_written_and_is_read(
    written: bool, read: bool, device: Device, tmp_path: Path
) -> None:
    path = tmp_path / "mid.ckpt"

    def resumed(writes: bool, reads: bool) -> Kept:
        write(device, path, stream=writes)
        torch.manual_seed(3)
        module = Kept()
        run = Bench(device, WINDOW if reads else None).trainer(max_epochs=3)
        run.fit(module, ckpt_path=path, weights_only=True)
        for group in run.optimizers[0].param_groups:
            module.record("rate", float(group["lr"]))
        module.record("steps", run.global_step)
        module.record("epochs", run.current_epoch)
        module.extra += [(name, value.cpu()) for name, value in tensors(run.optimizers[0].state_dict()).items()]
        return module

    reference, candidate = resumed(False, False), resumed(written, read)
    assert len(reference.losses) == len(candidate.losses) > 0
    assert all(torch.equal(a, b) for a, b in zip(reference.losses, candidate.losses, strict=True))
    unequal = [
        name
        for (name, a), (other, b) in zip(reference.extra, candidate.extra, strict=True)
        if name != other or not torch.equal(a, b)
    ]
    assert unequal == []
    state = candidate.state_dict()
    assert [name for name, value in reference.state_dict().items() if not torch.equal(value.cpu(), state[name])] == []


def test_validate_test_and_predict_read_a_checkpoint(tmp_path: Path) -> None:
    class Everything(Kept):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.record("test", self(batch))

        def predict_step(self, batch: Tensor, batch_idx: int) -> None:
            self.record("prediction", self(batch))

        test_dataloader = predict_dataloader = Kept.val_dataloader

    path = tmp_path / "written.ckpt"
    write("cpu", path, stream=True)

    def story(bench: Bench) -> Everything:
        module = Everything()
        run = bench.trainer()
        for stage in ("validate", "test", "predict"):
            getattr(run, stage)(module, ckpt_path=path)
        return module

    assert_same(story, "cpu")


LOADS_WITHOUT_US = """
import sys
sys.modules["lightning_superpipe"] = None  # any import of the package now fails
import lightning as L
import torch
from torch import nn

class Small(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))

module = Small.load_from_checkpoint(sys.argv[1])
assert module.hparams.width == 8
print(float(sum(parameter.double().sum() for parameter in module.parameters())))
assert all(parameter.device.type == "cpu" for parameter in module.parameters())
assert torch.load(sys.argv[1], weights_only=True)["optimizer_states"]
"""


class Small(L.LightningModule):
    """The module that the other process defines too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch).pow(2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.slow
def test_a_process_without_this_package_loads_the_module(tmp_path: Path) -> None:
    module = Small(8)
    run = Bench("cpu", WINDOW).trainer(max_epochs=1)
    run.fit(module, DataLoader(cast(Any, torch.ones(6, 8)), batch_size=2))
    run.save_checkpoint(tmp_path / "small.ckpt")
    command = [sys.executable, "-c", LOADS_WITHOUT_US, str(tmp_path / "small.ckpt")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    expected = float(sum(parameter.double().sum() for parameter in module.parameters()))
    assert float(ran.stdout) == pytest.approx(expected, abs=0, rel=0)
