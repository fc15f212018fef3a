"""When the optimizer's step runs under a Trainer: chosen, announced, refused; and what callbacks see of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_superpipe import Link, SuperpipeStrategy, attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import SuperpipeWarning, UnsupportedError
from lightning_superpipe.optimizer import UpdateStage
from tests.parity.harness import trainer
from tests.parity.probe import ProbeModule

HOSTILE = Adversary(max_delay_ms=1.0)


class Kept(ProbeModule):
    """Keeps every loss."""

    def configure_optimizers(self) -> Any:
        return self.adamw()


class Regrouped(Kept):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.record("norm", sum(p.grad.norm() for p in self.parameters()))


class Manual(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class OwnSchedule(Kept):
    """Sets the options of a step in the step itself, as loops without a scheduler do."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 * (1 + batch_idx), 0.1 * batch_idx
        return super().training_step(batch, batch_idx)


class Whole(Kept):
    """An optimizer that is known to no one."""

    def configure_optimizers(self) -> Any:
        class Own(torch.optim.SGD):
            pass

        return Own(self.parameters(), lr=0.1)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether each part that was started in the run was started in backward, and its unit."""
    parts: list[tuple[bool, int]] = []
    start = UpdateStage._start

    def noting(self: Any, unit: Any, part: Any, bench: Any, **options: Any) -> None:
        parts.append((self._announced is not None, unit.index))
        start(self, unit, part, bench, **options)

    monkeypatch.setattr(UpdateStage, "_start", noting)
    return parts


def fitted(module: ProbeModule, strategy: Any = None, **options: Any) -> ProbeModule:
    torch.manual_seed(0)
    trainer("cpu", strategy, **options).fit(module)
    return module


def streamed(update: str = "auto") -> SuperpipeStrategy:
    return SuperpipeStrategy(k=2, update=update, adversary=HOSTILE)


def made(kind: type[ProbeModule]) -> ProbeModule:
    torch.manual_seed(1)
    return kind()


def is_same(left: ProbeModule, right: ProbeModule) -> bool:
    losses = all(map(torch.equal, left.losses, right.losses)) and len(left.losses) == len(right.losses)
    return losses and all(map(torch.equal, left.parameters(), right.parameters()))


@pytest.mark.parametrize(
    ("kind", "options", "in_backward"),
    [
        (Kept, {}, True),
        (OwnSchedule, {}, True),
        (Kept, {"accumulate_grad_batches": 2}, True),
        (Kept, {"gradient_clip_val": 0.1}, False),
        (Kept, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, False),
        (Regrouped, {}, False),
        (Manual, {}, False),
    ],
)
def test_auto_updates_in_backward_unless_somebody_looks_at_gradients(
    kind: type[ProbeModule], options: dict[str, Any], in_backward: bool, split: list[tuple[bool, int]]
) -> None:
    plain = fitted(made(kind), **options)
    assert is_same(fitted(made(kind), streamed(), **options), plain)
    assert split and all(was_in_backward is in_backward for was_in_backward, _ in split[len(split) // 2 :])


@pytest.mark.parametrize(("store", "num_measured"), [("host", 5), ("disk", 6)])
def test_a_new_plan_holds_up_updates_in_backward_for_two_steps(
    store: str, num_measured: int, split: list[tuple[bool, int]]
) -> None:
    strategy = SuperpipeStrategy(store=store, adversary=HOSTILE, link=Link(), device_memory="1GiB", step_aside=False)
    assert is_same(fitted(made(Kept), strategy, max_epochs=3), fitted(made(Kept), max_epochs=3))
    size = len({unit for _, unit in split})
    steps = [{was_in_backward for was_in_backward, _ in split[at : at + size]} for at in range(0, len(split), size)]
    assert strategy.report().k == size  # of 3 before
    in_backward = [found == {True} for found in steps[-9:]]  # of steps 3 to 11
    assert [index for index, is_so in enumerate(in_backward, start=3) if not is_so] == [num_measured, num_measured + 1]


@pytest.mark.parametrize("update", ["at_once", "after_backward", "in_backward"])
def test_each_way_leaves_the_ordinary_weights(update: str, split: list[tuple[bool, int]]) -> None:
    assert is_same(fitted(made(Kept), streamed(update)), fitted(made(Kept)))
    assert bool(split) is (update != "at_once")


def test_auto_leaves_the_step_whole_where_nothing_can_be_hidden(split: list[tuple[bool, int]]) -> None:
    fitted(made(Kept), SuperpipeStrategy(k=2))
    assert split == []


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"gradient_clip_val": 0.5}, Kept, "gradient_clip_val=0.5"),
        ({}, Regrouped, "Regrouped.on_before_optimizer_step"),
        ({}, Manual, "manual optimization"),
    ],
)
def test_updates_in_backward_are_refused_with_the_reason_and_the_way_out(
    options: dict[str, Any], kind: type[ProbeModule], named: str
) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        fitted(made(kind), streamed("in_backward"), **options)
    assert named in str(refusal.value) and "Use update='after_backward'" in str(refusal.value)


def test_a_checkpoint_of_an_interrupted_step_forbids_updates_in_backward(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="OnExceptionCheckpoint, which saves when a step is interrupted"):
        fitted(
            made(Kept), streamed("in_backward"), callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True
        )


def test_loops_that_announce_no_step_refuse_updates_in_backward() -> None:
    with pytest.raises(UnsupportedError, match="needs a loop that announces its steps"):
        attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), device="cpu", update="in_backward")


def test_an_optimizer_that_cannot_be_split_is_named_once(recwarn: pytest.WarningsRecorder) -> None:
    assert is_same(fitted(made(Whole), streamed()), fitted(made(Whole)))
    said = [str(each.message) for each in recwarn if "runs as a whole" in str(each.message)]
    assert said == ["Own is not known to update each parameter by itself: its step runs as a whole."]


class Averages(L.Callback):
    """An average of weights by hand, as people write it."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            before = self.average.get(name, torch.zeros_like(parameter))
            self.average[name] = before.mul(0.9).add(parameter.detach(), alpha=0.1)


def test_callbacks_see_finished_updates(tmp_path: Path) -> None:
    def told(strategy: Any, folder: Path) -> tuple[ProbeModule, dict[str, Tensor], list[dict[str, Tensor]]]:
        averages = Averages()
        keeps = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = fitted(made(Kept), strategy, callbacks=[averages, keeps], enable_checkpointing=True)
        files = sorted(folder.glob("*.ckpt"))
        return module, averages.average, [torch.load(file, weights_only=True)["state_dict"] for file in files]

    plain, plain_average, plain_files = told(None, tmp_path / "plain")
    module, average, files = told(streamed(), tmp_path / "streamed")
    assert is_same(module, plain)
    assert all(torch.equal(average[name], plain_average[name]) for name in plain_average)
    assert len(files) == len(plain_files) > 2
    assert all(torch.equal(a[n], b[n]) for a, b in zip(files, plain_files, strict=True) for n in a)


class Interrupted(Kept):
    """Raises in the middle of the third backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if len(self.losses) == 2 and y.requires_grad:
            self.blocks[0].register_full_backward_hook(_raise)
        return y


def _raise(*_: Any) -> None:
    raise KeyError("in the middle of backward")


def test_an_interrupted_step_says_that_some_units_are_ahead() -> None:
    message = "the step was interrupted after .* units had been updated"
    with pytest.warns(SuperpipeWarning, match=message), pytest.raises(KeyError):
        fitted(made(Interrupted), streamed())


def test_with_updates_after_backward_an_interrupted_step_leaves_the_last_weights() -> None:
    def ended(run: Callable[[], object]) -> None:
        with pytest.raises(KeyError):
            run()

    plain, module = made(Interrupted), made(Interrupted)
    ended(lambda: fitted(plain))
    ended(lambda: fitted(module, streamed("after_backward")))
    assert all(map(torch.equal, module.parameters(), plain.parameters()))
