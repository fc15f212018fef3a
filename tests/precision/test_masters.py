"""Parameters of 2 bytes with masters: the numbers of an optimizer on a float32 copy, whoever loads or writes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe.adapters.plain import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.optimizer.masters import MASTER
from tests.engine.tiny import batches, chain
from tests.precision.loops import OPTIMIZERS, Plan, assert_same, mastered, streamed
from tests.precision.modules import MODULES, chain_case

DEVICES = ["cpu", pytest.param("emu:0", marks=pytest.mark.emu)]
LATE = {"update": "after_backward", "adversary": Adversary(max_delay_ms=2.0), "k": 2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"masked"}))  # that one mixes dtypes itself
def test_training_equals_an_optimizer_on_a_float32_copy(name: str, device: str) -> None:
    case = MODULES[name]
    candidate = streamed(case, module=case.module().bfloat16(), device=device, master_weights="float32")
    assert_same(candidate, mastered(case, device=device))


@pytest.mark.parametrize("update", ["after_backward", "at_once"])
@pytest.mark.parametrize("plan", [*map(Plan, OPTIMIZERS), Plan(accumulate=2, clip=0.05)], ids=str)
def test_every_optimizer_works_on_masters(plan: Plan, update: str) -> None:
    case = chain_case(num_batches=6)
    module = case.module().bfloat16()
    assert_same(
        streamed(case, module=module, plan=plan, update=update, master_weights="float32"), mastered(case, plan=plan)
    )


def test_masters_are_used_where_device_and_host_are_one() -> None:
    case = chain_case()
    candidate = streamed(case, module=case.module().bfloat16(), update="auto", adversary=None, master_weights="float32")
    assert_same(candidate, mastered(case))


def test_large_tensors_are_cast_in_parts() -> None:
    case = chain_case(3, 2, width=160)  # 51200 elements: more than torch casts in one thread
    assert_same(streamed(case, module=case.module().bfloat16(), master_weights="float32"), mastered(case))


def test_without_masters_the_parameters_are_updated_as_they_are() -> None:
    case = chain_case()
    module = case.module().bfloat16()
    outcome = streamed(case, module=module)
    plain = case.module().bfloat16()
    optimizer = OPTIMIZERS["fused"](plain.parameters())
    for x in case.inputs():
        optimizer.zero_grad()
        case.loss(plain, x.bfloat16()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(map(torch.equal, outcome.state.values(), plain.state_dict().values()))


# -- checkpoints


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, some: list[torch.Tensor]) -> None:
    for x in some:
        optimizer.zero_grad()
        module(x.bfloat16()).float().pow(2).mean().backward()
        optimizer.step()


def train(*, break_after: int | None, master_weights: str | None = "float32") -> tuple[nn.Module, Any]:
    """Train six steps, by way of a checkpoint file after some of them."""
    module, data = chain(4).bfloat16(), batches(6)
    optimizer = OPTIMIZERS["fused"](module.parameters())
    end = len(data) if break_after is None else break_after
    with attach(module, optimizer, device="cpu", master_weights=master_weights, **LATE):
        steps(module, optimizer, data[:end])
        file = io.BytesIO()
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    if break_after is not None:
        file.seek(0)
        saved = torch.load(file)
        module = chain(4, seed=9).bfloat16()
        module.load_state_dict(saved["module"])
        optimizer = OPTIMIZERS["fused"](module.parameters())
        with attach(module, optimizer, device="cpu", master_weights="float32", **LATE):
            optimizer.load_state_dict(saved["optimizer"])
            steps(module, optimizer, data[end:])
    return module, optimizer


def test_resuming_in_the_middle_changes_no_bit() -> None:
    whole, whole_optimizer = train(break_after=None)
    resumed, resumed_optimizer = train(break_after=3)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    for one, other in zip(resumed_optimizer.state.values(), whole_optimizer.state.values(), strict=True):
        assert {name: value.dtype for name, value in one.items()} == dict.fromkeys(other, torch.float32)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_checkpoint_without_masters_is_loaded_and_said_once(recwarn: pytest.WarningsRecorder) -> None:
    def without() -> tuple[nn.Module, Any]:
        return train(break_after=3, master_weights=None)

    _, optimizer = without()
    said = [str(each.message) for each in recwarn if "without float32 masters" in str(each.message)]
    assert len(said) == 1
    assert all(value.dtype is torch.float32 for state in optimizer.state.values() for value in state.values())
    module = chain(4).bfloat16()  # the same by hand: all that is there is widened
    first = OPTIMIZERS["fused"](module.parameters())
    steps(module, first, batches(6)[:3])
    copies = [nn.Parameter(parameter.detach().float()) for parameter in module.parameters()]
    second = OPTIMIZERS["fused"](copies)
    second.load_state_dict(first.state_dict())
    for x in batches(6)[3:]:
        module.zero_grad()
        module(x.bfloat16()).float().pow(2).mean().backward()
        for parameter, master in zip(module.parameters(), copies, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        second.step()
        with torch.no_grad():
            for parameter, master in zip(module.parameters(), copies, strict=True):
                parameter.copy_(master)
    resumed, _ = without()
    assert all(map(torch.equal, resumed.parameters(), module.parameters()))


def test_checkpoint_loads_into_the_ordinary_optimizer() -> None:
    module, optimizer = train(break_after=None)
    plain = OPTIMIZERS["fused"](module.parameters())
    plain.load_state_dict(optimizer.state_dict())
    steps(module, plain, batches(1))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# -- what users write


def test_what_is_written_to_a_parameter_goes_into_its_master() -> None:
    module, data = chain(3).bfloat16(), batches(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    with attach(module, optimizer, device="cpu", master_weights="float32", **LATE):
        steps(module, optimizer, data[:2])
        weight: nn.Parameter = module.get_parameter("blocks.1.up.weight")
        optimizer.state[weight][MASTER].mul_(1 + 2.0**-12)  # digits that the parameter does not hold
        before = optimizer.state[weight][MASTER].clone()
        with torch.no_grad():
            weight[0].clamp_(-0.01, 0.01)
        weight.data[1] = 7.0
        written = weight.detach()[:2].float().clone()
        steps(module, optimizer, data[2:])
        after = optimizer.state[weight][MASTER]
    assert torch.equal(after[2:], before[2:]), "untouched elements keep all their digits"
    assert torch.equal(after[1], written[1])
    assert torch.equal(after[0].bfloat16(), written[0].bfloat16())


# -- refusals


@pytest.mark.parametrize("kind", ["LBFGS", "Mine"])
def test_optimizer_that_cannot_be_split_is_refused_by_name(kind: str) -> None:
    module = chain(2).bfloat16()
    mine = type("Mine", (torch.optim.AdamW,), {})
    optimizer = (torch.optim.LBFGS if kind == "LBFGS" else mine)(module.parameters())
    with pytest.raises(UnsupportedError, match=f"{kind}.*AdamW"):
        attach(module, optimizer, device="cpu", master_weights="float32")
    with attach(chain(2), device="cpu", master_weights="float32"):  # nothing of 2 bytes: nothing to refuse
        pass


def test_scaler_that_leaves_its_factors_to_the_optimizer_is_refused() -> None:
    module = chain(2).bfloat16()
    optimizer = OPTIMIZERS["fused"](module.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with attach(module, optimizer, device="cpu", master_weights="float32"):
        scaler.scale(module(batches(1)[0].bfloat16()).float().mean()).backward()
        with pytest.raises(UnsupportedError, match=r"unscale_"):
            scaler.step(optimizer)


def test_float32_parameters_need_no_masters() -> None:
    module = chain(2)
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    with attach(module, optimizer, device="cpu", master_weights="float32", **LATE):
        module(batches(1)[0]).mean().backward()
        optimizer.step()
        assert all(MASTER not in state for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["adagrad", "momentum", "fused"])
def test_nothing_is_said_of_a_new_run(name: str, recwarn: pytest.WarningsRecorder) -> None:
    module = chain(2).bfloat16()
    optimizer = OPTIMIZERS[name](module.parameters())
    with attach(module, optimizer, device="cpu", master_weights="float32", **LATE):
        steps(module, optimizer, batches(2))
    assert [str(each.message) for each in recwarn if "masters" in str(each.message)] == []
