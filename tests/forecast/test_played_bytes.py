"""What is predicted without memory is what a streamed run reports, for every recipe."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.forecast.played import play
from lightning_superpipe.forecast.workload import workload_on
from lightning_superpipe.observe import MachineProfile
from lightning_superpipe.observe.report import Report
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve, Setting, Speeds
from tests.recipes.runs import Recipe, make_trainer
from tests.recipes.test_recipes import RECIPES

# Device and host share their memory here: a copy is over before the next unit computes.
AT_ONCE = Speeds(h2d=Curve.steady(1e15), d2h=Curve.steady(1e15), use_s=1e-6)
SHARE = 0.03
RECOMPUTED_SHARE = 0.05  # what is held in between is told from a step that keeps
REPEATS = 8  # of a recipe's tiny batch: with it a unit's weights are smaller than its activations, as in real ones


def run(module: L.LightningModule, batch: Any, k: int, activations: str = "keep") -> Report:
    """Train two steps on one batch, and return what the run reports."""
    strategy = SuperpipeStrategy(k=k, resident=0, activations=activations)
    trainer = make_trainer(strategy, max_steps=2, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    return strategy.report()


def made(recipe: Recipe) -> tuple[L.LightningModule, Any]:
    L.seed_everything(0, verbose=False)
    module, data = recipe.module(), recipe.data()
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return module, tree_map_only(torch.Tensor, lambda each: torch.cat([each] * REPEATS), batch)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_peak_bytes_of_a_recipe_are_those_of_its_run(
    name: str, k: int, tmp_path: Path, small_machine: MachineProfile
) -> None:
    module, batch = made(RECIPES[name](tmp_path))
    played = play(module, batch, SuperpipeConfig(k=k))
    found = simulate(workload_on(small_machine, played), AT_ONCE, Setting(k=k, update="in_backward"))
    report = run(module, batch, k)
    assert (found.peak.slots, found.peak.anchors) == (report.peak.slots, report.peak.anchors)
    if all(unit.tape.backward.operations for unit in played.units):  # what gets no gradient has no backward
        assert found.num_loads == report.last_step.num_loads
    predicted, measured = (peak.gradients + peak.activations for peak in (found.peak, report.peak))
    assert predicted == pytest.approx(measured, rel=SHARE)
    assert found.peak.total == pytest.approx(report.peak.total, rel=SHARE)


@pytest.mark.parametrize("name", ["fine_tuning", "image_classification_vit", "text_classification"])
def test_peak_bytes_where_all_recompute(name: str, tmp_path: Path, small_machine: MachineProfile) -> None:
    module, batch = made(RECIPES[name](tmp_path))
    played = play(module, batch, SuperpipeConfig(k=2))
    setting = Setting(k=2, activations=("recompute",) * len(played.units), update="in_backward")
    found = simulate(workload_on(small_machine, played), AT_ONCE, setting)
    assert found.peak.total == pytest.approx(run(module, batch, 2, "recompute").peak.total, rel=RECOMPUTED_SHARE)


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("name", ["fine_tuning", "image_classification_vit", "text_classification"])
def test_peak_bytes_where_all_offload(name: str, tmp_path: Path, small_machine: MachineProfile) -> None:
    module, batch = made(RECIPES[name](tmp_path))
    played = play(module, batch, SuperpipeConfig(k=2))
    setting = Setting(k=2, activations=("offload",) * len(played.units), update="in_backward")
    found = simulate(workload_on(small_machine, played), AT_ONCE, setting)
    assert found.peak.total == pytest.approx(run(module, batch, 2, "offload").peak.total, rel=SHARE)


@pytest.mark.parametrize("name", ["language_model", "fine_tuning_lora"])
def test_host_bytes_are_those_of_the_run(name: str, tmp_path: Path) -> None:
    module, batch = made(RECIPES[name](tmp_path))
    host = play(module, batch, SuperpipeConfig(k=2)).host
    held = run(module, batch, 2).host
    assert host.total == pytest.approx(held.total, rel=SHARE)
    assert host.states == pytest.approx(held.states, rel=SHARE)


def test_the_module_stays_as_it_was(tmp_path: Path) -> None:
    module, batch = made(RECIPES["fine_tuning"](tmp_path))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    identities = [id(parameter) for parameter in module.parameters()]
    play(module, batch, SuperpipeConfig())
    assert [id(parameter) for parameter in module.parameters()] == identities
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
