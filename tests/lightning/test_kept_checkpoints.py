"""ModelCheckpoint keeps the ordinary files, and runs go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from tests.lightning.stories import Bench, Watched, assert_same, metrics_of, tensors
from tests.parity.probe import Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")


def files_of(keep: ModelCheckpoint, folder: Path, module: ProbeModule) -> None:
    """Record which files a ModelCheckpoint kept, which is the best, and all tensors in them."""
    module.record("number of files", len(list(folder.glob("*.ckpt"))))
    for path in sorted(folder.glob("*.ckpt")):
        held = torch.load(path, weights_only=False, map_location="cpu")
        for name, value in tensors(held).items():
            module.record(f"{path.name}: {name.replace(str(folder), '')}", value)
    best = keep.best_model_score
    module.record(f"best is {Path(keep.best_model_path).name}", best if best is not None else 0.0)


KEEPERS: dict[str, dict[str, Any]] = {
    "best": {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{val_loss:.6f}"},
    "last": {"save_last": True, "monitor": "val_loss"},
    "linked": {"save_last": "link", "save_top_k": 1},
    "steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "weights": {"save_weights_only": True, "save_top_k": -1, "every_n_epochs": 1},
    "train_end": {"save_on_train_epoch_end": True, "monitor": "loss", "save_top_k": 1},
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("name", KEEPERS)
def test_kept_checkpoints_equal_those_of_the_ordinary_run(name: str, device: Device, tmp_path: Path) -> None:
    def story(bench: Bench) -> Watched:
        folder = tmp_path / ("plain" if bench.window is None else "streamed")
        keep = ModelCheckpoint(folder, **KEEPERS[name])
        module = Watched()
        run = bench.trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=3)
        run.fit(module)
        files_of(keep, folder, module)
        if name in ("best", "last"):
            run.validate(module, ckpt_path=name, verbose=False, weights_only=False)
            metrics_of(module, run)
        return module

    assert_same(story, device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("averaging", [None, EMAWeightAveraging, StochasticWeightAveraging])
def test_resuming_within_an_epoch_equals_the_ordinary_run(
    averaging: type[Callback] | None, device: Device, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        if averaging is None:
            return []
        return [EMAWeightAveraging() if averaging is EMAWeightAveraging else StochasticWeightAveraging(1e-2, 1)]

    def story(bench: Bench) -> Watched:
        folder = tmp_path / ("plain" if bench.window is None else "streamed")
        keep = ModelCheckpoint(folder, "kept", every_n_train_steps=6, save_top_k=-1)
        bench.trainer(callbacks=[keep, *callbacks()], enable_checkpointing=True, max_epochs=2).fit(Watched())
        torch.manual_seed(7)
        module = Watched()
        run = bench.trainer(max_epochs=4, callbacks=callbacks())
        run.fit(module, ckpt_path=folder / "kept.ckpt", weights_only=False)
        module.record("steps", run.global_step)
        return module

    assert_same(story, device)
