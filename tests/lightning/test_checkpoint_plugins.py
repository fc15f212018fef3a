"""Which plugin writes: ours by default, the user's where there is one, ours inside those that wrap."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.adapters.lightning import SuperpipeCheckpointIO
from lightning_superpipe.errors import SuperpipeError
from tests.lightning.stories import WINDOW, Bench, Originals, assert_same, tensors
from tests.parity.harness import trainer
from tests.parity.probe import ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_strategy_writes_with_its_own_plugin_unless_it_is_given_one() -> None:
    assert type(trainer("cpu", SuperpipeStrategy()).strategy.checkpoint_io) is SuperpipeCheckpointIO
    given = TorchCheckpointIO()
    assert trainer("cpu", SuperpipeStrategy(checkpoint_io=given)).strategy.checkpoint_io is given
    assert trainer("cpu", SuperpipeStrategy(), plugins=[given]).strategy.checkpoint_io is given


def test_wrapping_plugins_get_ours_inside_unless_they_have_one() -> None:
    wrapping = AsyncCheckpointIO()
    assert trainer("cpu", SuperpipeStrategy(), plugins=[wrapping]).strategy.checkpoint_io is wrapping
    assert type(wrapping.checkpoint_io) is SuperpipeCheckpointIO
    inner = TorchCheckpointIO()
    wrapping = AsyncCheckpointIO(inner)
    run = trainer("cpu", SuperpipeStrategy(), plugins=[wrapping])
    assert run.strategy.checkpoint_io is wrapping and wrapping.checkpoint_io is inner


def test_asynchronous_checkpoints_equal_those_of_the_ordinary_run(tmp_path: Path) -> None:
    def story(bench: Bench) -> ProbeModule:
        folder = tmp_path / ("plain" if bench.window is None else "streamed")
        module = ProbeModule()
        keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        run = bench.trainer(plugins=[AsyncCheckpointIO()], callbacks=[keep], enable_checkpointing=True, max_epochs=1)
        run.fit(module)
        for path in sorted(folder.iterdir()):
            held = tensors({key: torch.load(path)[key] for key in ("state_dict", "optimizer_states")})
            module.extra += [(f"{path.name} {name}", value) for name, value in held.items()]
        return module

    assert_same(story, "cpu")


def test_an_asynchronous_save_that_failed_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    module = ProbeModule()
    originals = Originals(module)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1)
    run = Bench("cpu", WINDOW).trainer(plugins=[AsyncCheckpointIO()], callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(SuperpipeError, match="make room"):
        run.fit(module)
    originals.assert_kept()


def test_both_namespaces_have_a_plugin_of_their_own(tmp_path: Path) -> None:
    theirs = importlib.import_module("lightning_superpipe.adapters.pytorch_lightning")
    base = importlib.import_module("lightning_fabric.plugins").TorchCheckpointIO
    plugin = theirs.SuperpipeCheckpointIO()
    assert isinstance(plugin, base) and not isinstance(plugin, TorchCheckpointIO)
    assert type(theirs.SuperpipeStrategy().checkpoint_io) is theirs.SuperpipeCheckpointIO
    plugin.save_checkpoint({"epoch": 3}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"epoch": 3}
    with pytest.raises(SuperpipeError, match="could not be written"):
        plugin.save_checkpoint({}, tmp_path / "a.ckpt" / "b.ckpt")
