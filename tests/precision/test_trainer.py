"""Both kinds of precision under Lightning's Trainer: updates in backward, precision plugins, scalers, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.adapters.plain import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.optimizer.masters import MASTER
from tests.engine.tiny import batches, chain
from tests.parity.harness import trainer
from tests.parity.probe import Device
from tests.precision.loops import OPTIMIZERS, SEED, Outcome, Plan, assert_same, mastered, wired
from tests.precision.modules import Case, chain_case

pytestmark = pytest.mark.filterwarnings("ignore")
DEVICES: list[Any] = ["cpu", pytest.param("emu", marks=pytest.mark.emu)]
CASE, WIDE = chain_case(5, 6), chain_case(5, 3, width=64)


class Module(L.LightningModule):
    """Trains the network of a case."""

    def __init__(self, case: Case, plan: Plan) -> None:
        super().__init__()
        self.net, self._case, self._plan = case.module(), case, plan
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._case.loss(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self._case.inputs(), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self._plan.optimizer](self.parameters())


def fit(device: Device, plan: Plan, *, case: Case = CASE, precision: str = "32-true", **options: Any) -> Outcome:
    module = Module(case, plan)
    strategy = SuperpipeStrategy(k=2, adversary=Adversary(max_delay_ms=1.0), **options)
    run = trainer(
        device,
        strategy,
        max_epochs=1,
        precision=precision,
        accumulate_grad_batches=plan.accumulate,
        gradient_clip_val=plan.clip,
    )
    torch.manual_seed(SEED)
    run.fit(module)
    state = {name: value.clone() for name, value in module.net.state_dict().items()}
    return Outcome(module.losses, state, run.optimizers[0].state_dict(), strategy.report())


PLANS = [Plan(), Plan("adamw"), Plan(clip=0.05), Plan(accumulate=2)]


def place(device: Device) -> str:
    return "emu:0" if device == "emu" else "cpu"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_trainer_gives_the_numbers_of_the_loop_with_a_narrow_copy(plan: Plan, device: Device) -> None:
    candidate = fit(device, plan, wire_dtype="bfloat16")
    assert_same(candidate, wired(CASE, torch.bfloat16, device=place(device), plan=plan))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_bf16_true_with_masters_equals_an_optimizer_on_a_float32_copy(plan: Plan, device: Device) -> None:
    candidate = fit(device, plan, precision="bf16-true", master_weights="float32")
    assert_same(candidate, mastered(CASE, device=place(device), plan=plan))


@pytest.mark.parametrize("device", DEVICES)
def test_a_narrow_wire_halves_the_bytes_of_both_ways(device: Device) -> None:
    wide = fit(device, Plan(), case=WIDE).report
    narrow = fit(device, Plan(), case=WIDE, wire_dtype="bfloat16").report
    assert wide is not None and narrow is not None
    assert narrow.num_loads == wide.num_loads
    assert narrow.d2h_bytes * 2 == wide.d2h_bytes
    assert narrow.h2d_bytes == pytest.approx(wide.h2d_bytes / 2, rel=0.02)  # each tensor is aligned
    assert narrow.peak.slots == pytest.approx(wide.peak.slots / 2, rel=0.02)


def test_wire_of_the_parameters_own_dtype_changes_nothing() -> None:
    assert_same(
        fit("cpu", Plan(), precision="bf16-true", wire_dtype="bfloat16"), fit("cpu", Plan(), precision="bf16-true")
    )


def test_wire_of_another_narrow_dtype_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"wire_dtype='float16'.*'net.blocks.0.norm.weight'.*bfloat16"):
        fit("cpu", Plan(), precision="bf16-true", wire_dtype="float16")


@pytest.mark.parametrize("growth", [1, 100])
def test_scaler_over_a_float16_wire_equals_the_loop_with_a_narrow_copy(growth: int) -> None:
    """The scaler sees float32 gradients at home: it unscales them, finds overflows and skips their steps."""
    inputs = batches(6)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=growth, growth_factor=16.0)

    streamed, optimizer = chain(4), OPTIMIZERS["adamw"]
    own, own_scaler, losses = optimizer(streamed.parameters()), scaler(), []
    with attach(streamed, own, device="cpu", k=2, wire_dtype="float16", adversary=Adversary(max_delay_ms=1.0)):
        for x in inputs:
            own.zero_grad()
            loss = streamed(x).float().pow(2).mean()
            own_scaler.scale(loss).backward()
            own_scaler.step(own)
            own_scaler.update()
            losses.append(loss.item())

    masters, work = chain(4), chain(4).half()
    plain, plain_scaler = optimizer(masters.parameters()), scaler()
    for x, expected in zip(inputs, losses, strict=True):
        with torch.no_grad():
            for mine, master in zip(work.parameters(), masters.parameters(), strict=True):
                mine.copy_(master)
        loss = work(x.half()).float().pow(2).mean()
        assert loss.item() == expected
        plain_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for mine, master in zip(work.parameters(), masters.parameters(), strict=True):
            assert mine.grad is not None
            master.grad, mine.grad = mine.grad.float(), None
        plain_scaler.step(plain)
        plain_scaler.update()
    assert own_scaler.get_scale() == plain_scaler.get_scale()
    assert (growth == 1) == (own_scaler.get_scale() != 2.0**12), "overflows happen where the scale grows at each step"
    assert all(map(torch.equal, streamed.parameters(), masters.parameters()))


# -- checkpoints


def fit_to(epochs: int, folder: Path, resume: Path | None = None, seed: int = 0) -> tuple[Module, Any]:
    module = Module(chain_case(4, 3), Plan())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(seed)  # what is loaded must come from the file
    strategy = SuperpipeStrategy(k=2, master_weights="float32", adversary=Adversary(max_delay_ms=1.0))
    run = trainer("cpu", strategy, max_epochs=epochs, precision="bf16-true")
    run.fit(module, ckpt_path=None if resume is None else str(resume))
    run.save_checkpoint(folder / "last.ckpt")
    return module, run.optimizers[0]


def test_resuming_a_trainer_in_the_middle_changes_no_bit(tmp_path: Path) -> None:
    whole, whole_optimizer = fit_to(4, tmp_path)
    fit_to(2, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert all(state[MASTER].dtype is torch.float32 for state in saved.values())
    resumed, optimizer = fit_to(4, tmp_path, resume=tmp_path / "last.ckpt", seed=1)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    for one, other in zip(optimizer.state.values(), whole_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_weights_of_a_streamed_run_in_two_dtypes_are_those_of_the_module(tmp_path: Path) -> None:
    module = Module(CASE, Plan())
    run = trainer("cpu", SuperpipeStrategy(k=2, wire_dtype="bfloat16", adversary=Adversary()), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    fresh: nn.Module = Module(CASE, Plan())
    fresh.load_state_dict(saved)
    assert all(map(torch.equal, fresh.parameters(), module.parameters()))
