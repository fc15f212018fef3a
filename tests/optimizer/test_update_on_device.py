"""The option update_on_device: exact in every loop and precision, counted, refused where it cannot work."""

from __future__ import annotations

import importlib
import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe import SuperpipeStrategy, attach
from lightning_superpipe.config import Adversary, Link, SuperpipeConfig
from lightning_superpipe.errors import BudgetError, ConfigError, UnsupportedError
from lightning_superpipe.observe import MachineProfile
from lightning_superpipe.observe.kernels import with_kernels
from lightning_superpipe.observe.rates import MemoryRate
from lightning_superpipe.planning.workload import UnitWork, Workload
from tests.engine.tiny import batches, chain
from tests.lightning.test_update import Kept, fitted, is_same, made
from tests.precision.loops import OPTIMIZERS, Plan, assert_same, mastered, streamed, wired
from tests.precision.modules import chain_case

DEVICES = ["cpu", pytest.param("emu:0", marks=pytest.mark.emu)]
PLANS = [Plan("adamw"), Plan("fused", accumulate=2, clip=0.05), Plan("momentum", clip=0.05), Plan("adafactor")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_leaves_the_same_bits(plan: Plan, share: float, device: str) -> None:
    case = chain_case(num_batches=6)
    candidate = streamed(case, plan=plan, device=device, update_on_device=share)
    assert_same(candidate, streamed(case, plan=plan, device=device, update="at_once", adversary=None))
    assert candidate.report is not None
    assert candidate.report.num_on_device == {0.3: 2, 1.0: 4}[share]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_travel_with_their_states(name: str, device: str) -> None:
    case, plan = chain_case(num_batches=5), Plan(name, clip=0.05)
    module = case.module().bfloat16()
    candidate = streamed(case, module=module, plan=plan, device=device, master_weights="float32", update_on_device=0.5)
    assert_same(candidate, mastered(case, plan=plan, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_slots_of_another_dtype_are_updated(share: float, device: str) -> None:
    case, plan = chain_case(num_batches=5), Plan("adamw", accumulate=2, clip=0.05)
    candidate = streamed(case, plan=plan, device=device, wire_dtype="bfloat16", update_on_device=share)
    assert_same(candidate, wired(case, torch.bfloat16, plan=plan, device=device))


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("options", [{"k": 1}, {"k": 3, "k_prime": 2}, {"resident": 1}], ids=str)
def test_windows_and_activations_change_nothing(options: dict[str, Any], activations: str) -> None:
    case, plan = chain_case(6, num_batches=5), Plan("adamw", clip=0.05)
    candidate = streamed(case, plan=plan, activations=activations, update_on_device=0.5, **options)
    assert_same(candidate, streamed(case, plan=plan, update="at_once", adversary=None))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_trainer_leaves_the_ordinary_weights(options: dict[str, Any]) -> None:
    strategy = SuperpipeStrategy(k=2, update_on_device=0.5, adversary=Adversary(max_delay_ms=1.0))
    assert is_same(fitted(made(Kept), strategy, **options), fitted(made(Kept), **options))
    assert strategy.report().num_on_device > 0
    assert "updated on the device" in str(strategy.report())


def test_states_are_the_users_own_objects_and_on_the_host() -> None:
    module = chain(4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    with attach(module, optimizer, device="cpu", k=2, update_on_device=1.0):
        kept: list[Any] = []
        for x in batches(4):
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            states = [state for parameter in module.parameters() for state in optimizer.state[parameter].values()]
            kept = kept or states
            assert all(now is before for now, before in zip(states, kept, strict=True))
            assert all(state.device.type == "cpu" for state in states)


# -- what it takes


def budget_of(module: nn.Module, optimizer: torch.optim.Optimizer, budget: int) -> None:
    attach(module, optimizer, device="cpu", k=2, update_on_device=0.5, device_memory=budget).close()


def test_budget_counts_the_scratch() -> None:
    module = chain(4)
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(
        BudgetError, match=r"update_on_device takes .* \((\d+) bytes\).*or allow (\d+) bytes"
    ) as refused:
        budget_of(module, optimizer, 8 << 10)
    needed = int(str(refused.value).split("or allow ")[1].split()[0])
    budget_of(module, optimizer, needed)
    with pytest.raises(BudgetError):
        budget_of(module, optimizer, needed - 1)


def test_peak_holds_the_scratch() -> None:
    case = chain_case(num_batches=4)
    without, with_it = (streamed(case, plan=Plan("adamw"), update_on_device=share).report for share in (0.0, 1.0))
    assert without is not None and with_it is not None
    gradients_and_states = 2 * 4 * 3 * sum(p.numel() for p in case.module().blocks[0].parameters())  # type: ignore[union-attr,index]
    assert with_it.peak.anchors - without.peak.anchors >= gradients_and_states


# -- the share that is found

UNIT = UnitWork("h", 100, 80, state_bytes=160, forward_s=0.25, backward_s=0.75, update_s=3.0)


def test_kernels_take_what_the_devices_memory_takes() -> None:
    machine = MachineProfile("emu:0", False, (), (), {}, memory=(MemoryRate(1200, (4.0,)),))
    workload = Workload((UNIT, replace(UNIT, gradient_bytes=0), replace(UNIT, update_s=0.0)))
    there = [unit.update_on_device_s for unit in with_kernels(workload, machine, shares_memory=False).units]
    assert there == pytest.approx([(80 + 2 * (100 + 160)) / 300, None, None])
    unknown = with_kernels(workload, None, shares_memory=False)
    assert [unit.update_on_device_s for unit in unknown.units] == [0.0, None, None]


def test_a_device_that_is_the_host_is_no_faster() -> None:
    assert with_kernels(Workload((UNIT,)), None, shares_memory=True).units[0].update_on_device_s == 3.0


@pytest.mark.parametrize("record_step", [None, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_auto_takes_what_the_model_finds_once(share: float, record_step: int | None, monkeypatch: Any) -> None:
    asked: list[Workload] = []

    def choose(workload: Workload, *_: Any) -> float:
        asked.append(workload)
        return share

    monkeypatch.setattr("lightning_superpipe.optimizer.share.choose_share", choose)
    case, plan = chain_case(num_batches=9), Plan("adamw", clip=0.05)
    link = Link(h2d_gb_s=1.0, d2h_gb_s=1.0)
    candidate = streamed(case, plan=plan, link=link, update_on_device="auto", record_step=record_step)
    assert_same(candidate, streamed(case, plan=plan, update="at_once", adversary=None))
    assert len(asked) == 1
    assert [unit.update_s > 0 for unit in asked[0].units] == [True] * 4
    assert candidate.report is not None and candidate.report.num_on_device == 4 * share


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_auto_waits_for_an_update_where_gradients_accumulate(accumulate: int, monkeypatch: Any) -> None:
    asked: list[Workload] = []

    def choose(workload: Workload, *_: Any) -> float:
        asked.append(workload)
        return 0.5

    monkeypatch.setattr("lightning_superpipe.optimizer.share.choose_share", choose)
    case, plan = chain_case(num_batches=3 * accumulate + 6), Plan("adamw", accumulate=accumulate)
    candidate = streamed(case, plan=plan, update_on_device="auto", k=2)
    assert_same(candidate, streamed(case, plan=plan, update="at_once", adversary=None))
    assert [unit.update_s > 0 for unit in asked[0].units] == [True] * 4
    assert 1 / (accumulate + 4) <= asked[0].updates <= 0.5
    assert candidate.report is not None and candidate.report.num_on_device == 2


@pytest.mark.emu
def test_auto_updates_on_the_device_where_the_host_is_slow_and_says_so(
    emu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = [importlib.import_module(f"torch.optim.{name}") for name in ("adam", "adamw")]
    adam = modules[0].adam

    def slowly(parameters: Any, *arguments: Any, **options: Any) -> Any:
        if parameters and parameters[0].device.type == "cpu":
            time.sleep(0.02)
        return adam(parameters, *arguments, **options)

    for module in modules:
        monkeypatch.setattr(module, "adam", slowly, raising=False)
    net = chain(6, width=64)
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    with caplog.at_level("INFO"), attach(net, optimizer, device=emu, k=2, update_on_device="auto") as pipe:
        for x in batches(12, width=64):
            optimizer.zero_grad()
            net(x.to(emu)).pow(2).mean().backward()
            optimizer.step()
        slow = pipe.report()
    assert slow.num_on_device > 0
    said = r"update_on_device=[\d.]+: the first \d+% of the units .* predicted: [\d.]+ ms a step, [\d.]+ with all"
    assert re.search(said, slow.plan) and re.search(said, " ".join(str(slow).split()))
    assert any(re.search(said, record.getMessage()) for record in caplog.records)


def test_a_choice_of_the_window_keeps_the_share() -> None:
    case, plan = chain_case(num_batches=9), Plan("adamw", clip=0.05)
    options: dict[str, Any] = {"k": "auto", "resident": "auto", "link": Link(h2d_gb_s=1.0, d2h_gb_s=1.0)}
    candidate = streamed(case, plan=plan, update_on_device=0.5, device_memory="1GiB", **options)
    assert_same(candidate, streamed(case, plan=plan, update="at_once", adversary=None))
    assert candidate.report is not None and candidate.report.num_on_device == 2
    assert "50% of the units on the device" in candidate.report.plan


# -- what cannot be


@pytest.mark.parametrize("share", [-0.1, 1.1, "all", None, True, float("nan")])
def test_share_outside_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match=r"update_on_device=.* from 0\.0 to 1\.0 is allowed, or 'auto'"):
        SuperpipeConfig(update_on_device=share)


def test_share_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match="update='at_once' leaves nothing"):
        SuperpipeConfig(update_on_device=0.5, update="at_once")


def capturable(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters)
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


@pytest.mark.parametrize("make", [torch.optim.LBFGS, capturable])
def test_optimizer_that_cannot_be_split_is_refused(make: Any) -> None:
    module = chain(3)
    with pytest.raises(UnsupportedError, match=r"update_on_device=0\.5 cannot be used with (LBFGS|AdamW)"):
        attach(module, make(module.parameters()), device="cpu", update_on_device=0.5)


@pytest.mark.filterwarnings("ignore:LBFGS is not known")
def test_auto_leaves_an_optimizer_that_cannot_be_split_whole() -> None:
    module = chain(3)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=1)
    with attach(module, optimizer, device="cpu", update_on_device="auto", update="after_backward") as pipe:
        (x,) = batches(1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step(lambda: torch.tensor(0.0))
        assert pipe.report().num_on_device == 0


def test_auto_chooses_nothing_that_does_not_fit(monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_superpipe.optimizer.share.choose_share", lambda *_: 1.0)
    case, plan = chain_case(num_batches=8), Plan("adamw", clip=0.05)
    link = Link(h2d_gb_s=1.0, d2h_gb_s=1.0)
    options: dict[str, Any] = {"link": link, "update_on_device": "auto", "resident": 0}
    free = streamed(case, plan=plan, **options).report
    tight = streamed(case, plan=plan, device_memory=16 << 10, **options).report
    assert free is not None and tight is not None
    assert (free.num_on_device, tight.num_on_device) == (4, 0)


def test_scaler_that_leaves_its_factors_to_the_optimizer_is_refused() -> None:
    module = chain(3)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    with attach(module, optimizer, device="cpu", update_on_device=0.5):
        module(batches(1)[0]).square().mean().backward()
        optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]  # as GradScaler.step does
        with pytest.raises(UnsupportedError, match="gradient scaler"):
            optimizer.step()
