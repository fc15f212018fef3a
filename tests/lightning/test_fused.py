"""The policy for fused kernels: whose choice it is, that training goes on, and what checkpoints hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe import SuperpipeStrategy
from tests.lightning.stories import Bench, assert_same
from tests.parity.harness import trainer
from tests.parity.probe import WIDTH, Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

FACTORIES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, **o),
    "Adam": lambda p, **o: torch.optim.Adam(p, lr=1e-2, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, **o),
    "Adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=1e-2, **o),
}


class Chooses(ProbeModule):
    """Notes its optimizer's kernels at every step."""

    def __init__(self, name: str = "AdamW", **options: Any) -> None:
        self.name, self.options = name, options
        super().__init__()
        self.seen: list[list[bool | None]] = []

    def configure_optimizers(self) -> Any:
        return FACTORIES[self.name](self.parameters(), **self.options)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.seen.append([group.get("fused") for group in optimizer.param_groups])


def streams(device: Device = "cpu", **options: Any) -> tuple[SuperpipeStrategy, L.Trainer]:
    strategy = SuperpipeStrategy(k=2, **options)
    return strategy, trainer(device, strategy, max_epochs=1)


@pytest.mark.parametrize("name", FACTORIES)
def test_fused_kernels_are_used_where_the_choice_was_left_open(name: str) -> None:
    """Chosen for the user, they do what they do when the user chooses them."""
    torch.manual_seed(0)
    chosen = Chooses(name)
    strategy, run = streams(fused_optimizer=True)
    run.fit(chosen)
    assert chosen.seen == [[True]] * 4
    torch.manual_seed(0)
    own = Chooses(name, fused=True)
    trainer("cpu", max_epochs=1).fit(own)
    assert all(torch.equal(a, b) for a, b in zip(chosen.parameters(), own.parameters(), strict=True))
    assert strategy.report().num_loads > 0


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}, {"foreach": False, "fused": False}])
def test_the_users_own_choice_is_kept(options: dict[str, Any]) -> None:
    module = Chooses("AdamW", **options)
    _, run = streams(fused_optimizer=True)
    run.fit(module)
    assert module.seen == [[options.get("fused")]] * 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("wanted", ["auto", False])
def test_nothing_is_chosen_unless_asked_for(wanted: Any, device: Device) -> None:
    module = Chooses("AdamW")
    _, run = streams(device, fused_optimizer=wanted)
    run.fit(module)
    assert module.seen == [[None]] * 4


@pytest.mark.emu
def test_fused_kernels_work_for_a_module_on_another_device() -> None:
    module = Chooses("AdamW")
    _, run = streams("emu", fused_optimizer=True)
    run.fit(module)
    assert module.seen == [[True]] * 4
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Own(torch.optim.AdamW):
    """A subclass whose step could rely on anything."""


def test_other_optimizers_are_left_alone() -> None:
    for kind in (Own, torch.optim.RMSprop, torch.optim.NAdam):

        class Other(Chooses):
            def configure_optimizers(self) -> Any:
                return kind(self.parameters(), lr=1e-3)  # noqa: B023  # used within its turn of the loop

        module = Other()
        _, run = streams(fused_optimizer=True)
        run.fit(module)
        assert module.seen == [[None]] * 4
        assert run.optimizers[0].param_groups[0].get("fused") is None


class Groups(Chooses):
    """One group left open, one chosen, one that fused kernels do not fit."""

    def build(self) -> None:
        self.table = nn.Embedding(4, WIDTH, sparse=True)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(x + self.table((x[:, 0] > 0).long()))

    def configure_optimizers(self) -> Any:
        groups: Any = [
            {"params": list(self.blocks.parameters())},
            {"params": list(self.head.parameters()), "fused": True},
            {"params": list(self.embed.parameters()), "fused": False},
            {"params": [self.table.weight]},
        ]
        return torch.optim.SGD(groups, lr=0.01)


def test_each_group_is_looked_at_by_itself(tmp_path: Path) -> None:
    module = Groups()
    _, run = streams(fused_optimizer=True)
    run.fit(module)
    assert module.seen == [[True, True, False, None]] * 4
    run.save_checkpoint(tmp_path / "a.ckpt")
    (state,) = torch.load(tmp_path / "a.ckpt")["optimizer_states"]
    assert [group["fused"] for group in state["param_groups"]] == [None, True, False, None]


@pytest.mark.parametrize("moment", ["during", "after"])
def test_checkpoints_hold_the_users_own_choice(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"

    class Saves(Chooses):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.save_checkpoint(path)

    module = Saves("AdamW") if moment == "during" else Chooses("AdamW")
    _, run = streams(fused_optimizer=True)
    run.fit(module)
    if moment == "after":
        run.save_checkpoint(path)
    (state,) = torch.load(path)["optimizer_states"]
    assert [group["fused"] for group in state["param_groups"]] == [None]


def test_the_optimizer_is_given_back_as_it_was() -> None:
    module = Chooses("AdamW")
    _, run = streams(fused_optimizer=True)
    run.fit(module)
    assert run.optimizers[0].param_groups[0]["fused"] is None


def test_resuming_goes_on_with_fused_kernels_and_plain_runs_without(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    _, run = streams(fused_optimizer=True)
    run.fit(Chooses("AdamW"))
    run.save_checkpoint(path)
    for strategy, expected in ((SuperpipeStrategy(k=2, fused_optimizer=True), True), (None, None)):
        module = Chooses("AdamW")
        resumed = trainer("cpu", strategy, max_epochs=2)
        resumed.fit(module, ckpt_path=path)
        assert module.seen == [[expected]] * 4
        assert cast(Any, resumed.optimizers[0].state[module.head.weight])["step"] == 8


def test_resuming_keeps_a_choice_that_the_file_holds(tmp_path: Path) -> None:
    """Lightning loads a file's groups over those of the new optimizer: the file's explicit choice wins, as ever."""
    path = tmp_path / "a.ckpt"
    plain = trainer("cpu", max_epochs=1)
    plain.fit(Chooses("AdamW", fused=True))
    plain.save_checkpoint(path)
    module = Chooses("AdamW")
    _, run = streams(fused_optimizer=True)
    run.fit_loop.max_epochs = 2
    run.fit(module, ckpt_path=path)
    run.save_checkpoint(path)
    (state,) = torch.load(path)["optimizer_states"]
    assert [group["fused"] for group in state["param_groups"]] == [True]


class Backbone(Chooses):
    """Gets a group later."""

    @property
    def backbone(self) -> nn.Module:
        return self.blocks

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_groups_that_come_later_train_too() -> None:
    module = Backbone()
    strategy = SuperpipeStrategy(k=2, fused_optimizer=True)
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    before = copy.deepcopy(module.block(0).state_dict())
    trainer("cpu", strategy, max_epochs=2, callbacks=[callback]).fit(module)
    assert module.seen[0] == [True] and len(module.seen[-1]) == 2
    assert not torch.equal(before["up.weight"], module.block(0).up.weight)


def test_users_fused_kernels_equal_the_ordinary_run_with_accumulation_and_two_fits() -> None:
    def story(bench: Bench) -> Chooses:
        module = Chooses("AdamW", fused=True)
        run = bench.trainer(max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.1)
        run.fit(module)
        run.fit_loop.max_epochs = 2
        run.fit(module)
        return module

    assert_same(story, "cpu")
