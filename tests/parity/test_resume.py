"""A checkpoint is an ordinary Lightning file: written with or without streaming, resumed with or without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.parity.harness import Outcome, Window, assert_equal, outcome, streamed, trainer
from tests.parity.probe import Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOW = Window(2, 1)


class Tied(ProbeModule):
    """A tied head and a batch norm: what stays on the device must be loaded from the file too."""

    def build(self) -> None:
        self.norm = torch.nn.BatchNorm1d(self.embed.out_features)
        self.head = torch.nn.Linear(self.embed.in_features, self.embed.out_features)
        self.head.weight = self.embed.weight

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(self.norm(x))


def write(device: Device, path: Path, *, stream: bool, window: Window = WINDOW, **options: Any) -> dict[str, Any]:
    """Train two epochs, save to ``path`` and return what the file holds."""
    L.seed_everything(0, verbose=False)
    run = trainer(device, streamed(window) if stream else None, max_epochs=2)
    run.fit(Tied())
    run.save_checkpoint(path, **options)
    loaded: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    return loaded


def resume(device: Device, path: Path, *, stream: bool, window: Window = WINDOW) -> Outcome:
    """Train two more epochs from ``path`` in a module that was initialised otherwise."""
    L.seed_everything(1, verbose=False)
    module = Tied()
    run = trainer(device, streamed(window) if stream else None, max_epochs=4)
    run.fit(module, ckpt_path=path, weights_only=False)
    return outcome(module, run)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return all tensors of a nested checkpoint by path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for k, v in items for key, tensor in tensors(v, f"{name}/{k}").items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_checkpoints_are_exchangeable_between_streamed_and_ordinary_runs(device: Device, tmp_path: Path) -> None:
    plain = write(device, tmp_path / "plain.ckpt", stream=False)
    written = write(device, tmp_path / "streamed.ckpt", stream=True)
    expected, got = tensors(plain), tensors(written)
    assert expected.keys() == got.keys() and len(expected) > 50
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []

    reference = resume(device, tmp_path / "plain.ckpt", stream=False)
    for path, stream in (("plain.ckpt", True), ("streamed.ckpt", False), ("streamed.ckpt", True)):
        assert_equal(reference, resume(device, tmp_path / path, stream=stream))


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_streamed_checkpoint_holds_host_tensors_of_ordinary_size(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    write(device, path, stream=True, weights_only=True)
    loaded = torch.load(path, weights_only=True)
    assert "optimizer_states" not in loaded
    assert {tensor.device.type for tensor in tensors(loaded).values()} == {"cpu"}
    num_bytes = sum(tensor.nbytes for tensor in Tied().state_dict().values())
    assert path.stat().st_size < 2 * num_bytes + 50_000, "a view of flat storage was saved with all of it"
