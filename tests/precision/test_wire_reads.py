"""What reads and writes device copies in another dtype: evaluation, buffers, forwards that write, late backwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.adapters.plain import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.engine.casting import cast_into, take_changes
from lightning_superpipe.engine.wire import Wire
from tests.engine.tiny import WIDTH, batches, chain
from tests.precision.loops import Plan, assert_same, streamed, wired
from tests.precision.modules import MODULES, Case

pytestmark = pytest.mark.filterwarnings("ignore")
DEVICES = ["cpu", pytest.param("emu:0", marks=pytest.mark.emu)]
OPTIONS: dict[str, Any] = {"k": 2, "wire_dtype": "bfloat16", "adversary": Adversary(max_delay_ms=0.5)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["chain", "tied", "images", "llama"])
def test_evaluation_equals_the_narrow_copy(name: str, device: str) -> None:
    case = MODULES[name]
    module, x = case.module().eval(), case.inputs()[0].to(device)
    narrow = copy.deepcopy(module).to(device, torch.bfloat16)
    with torch.no_grad():
        expected = case.loss(narrow, x.bfloat16() if x.is_floating_point() else x).item()
        with attach(module, device=device, **OPTIONS):
            assert [case.loss(module, x).item() for _ in range(3)] == [expected] * 3


class Penalised(nn.Module):
    """Reads all weights outside their units."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(4)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.body(x).float().pow(2).mean()
        for parameter in self.parameters():
            loss = loss + parameter.float().pow(2).sum()
        return loss


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_reads_weights_outside_their_units_reads_the_copies(device: str) -> None:
    case = Case(Penalised, lambda: batches(3), lambda loss: loss)
    assert_same(streamed(case, device=device, wire_dtype="bfloat16"), wired(case, torch.bfloat16, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_that_nobody_writes_keep_their_digits(device: str) -> None:
    case = MODULES["masked"]
    module, before = case.module(), case.module().state_dict()
    assert not torch.equal(before["blocks.0.shift"], before["blocks.0.shift"].bfloat16().float())
    streamed(case, module=module, device=device, wire_dtype="bfloat16")
    after = module.state_dict()
    assert torch.equal(after["blocks.0.shift"], before["blocks.0.shift"])
    assert after["blocks.0.norm.running_mean"].dtype is torch.float32
    assert after["blocks.0.norm.num_batches_tracked"] == 3


class Clamping(nn.Module):
    """Writes to its own weight, a row of it, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight[0].fill_(0.125)
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_that_writes_changes_of_a_master_what_it_wrote(device: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(Clamping() for _ in range(4)))
    before = copy.deepcopy(module.state_dict())
    with attach(module, device=device, **OPTIONS), torch.no_grad():
        module(batches(1)[0].to(device))
    for name, value in module.state_dict().items():
        expected = before[name].clone()
        if name.endswith("weight"):
            expected[0] = 0.125
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("device", DEVICES)
def test_backward_after_the_end_uses_the_dtype_of_its_forward(device: str) -> None:
    module, work, x = chain(3), chain(3).to(device, torch.bfloat16), batches(1)[0].to(device)
    with attach(module, device=device, **OPTIONS):
        loss = module(x).float().pow(2).mean()
    loss.backward()
    work(x.bfloat16()).float().pow(2).mean().backward()
    for mine, expected in zip(module.parameters(), work.parameters(), strict=True):
        assert mine.grad is not None and expected.grad is not None
        assert mine.grad.dtype is torch.float32
        assert torch.equal(mine.grad, expected.grad.to("cpu").float())


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_parameters_beside_trained_ones_are_cast_as_well(device: str) -> None:
    def make() -> nn.Module:
        module = chain(4)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("up" in name)
        return module

    case = Case(make, lambda: batches(3))
    plan = Plan("adamw")
    assert_same(
        streamed(case, device=device, plan=plan, wire_dtype="bfloat16"),
        wired(case, torch.bfloat16, device=device, plan=plan),
    )


# -- the pieces


@pytest.mark.parametrize("size", [0, 5, 1 << 15, (1 << 15) + 3])
def test_chunked_casts_equal_whole_ones(size: int) -> None:
    wide = torch.randn(2, size).t()
    narrow = torch.empty_like(wide, dtype=torch.bfloat16)
    cast_into(narrow, wide)
    assert torch.equal(narrow, wide.bfloat16())
    assert take_changes(wide, narrow) == 0
    narrow[size // 2 :] = 3.0
    changed = int((narrow != wide.bfloat16()).sum())
    assert take_changes(wide, narrow) == changed
    assert torch.equal(wide.bfloat16(), narrow)


def test_not_a_number_goes_into_the_master() -> None:
    master = torch.ones(3)
    assert take_changes(master, torch.tensor([1.0, float("nan"), 1.0], dtype=torch.bfloat16)) == 1
    assert master.isnan().tolist() == [False, True, False]


def test_only_floating_point_inputs_are_cast_and_containers_stay() -> None:
    wire, whole = Wire(torch.bfloat16), [torch.ones(2, dtype=torch.int64), "text"]
    assert wire.inputs(whole) is whole
    cast = wire.inputs({"x": torch.ones(2), "mask": whole[0]})
    assert (cast["x"].dtype, cast["mask"]) == (torch.bfloat16, whole[0])
    assert Wire().inputs(cast) is cast
