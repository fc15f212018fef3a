"""Policies for activations: equal numbers and loads, whatever units are given and return."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_superpipe.engine.activations import Choice, Policy, choose_policies
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import ConfigError
from tests.engine.late_lanes import LANE_ORDERS, LaneOrder, LateCompute, LateLanes
from tests.engine.policies import NUM_BLOCKS, choices, made_of, stream
from tests.engine.tiny import CPU, Block, Chain, Result, batches, chain, is_equal, open_engine, train

POLICIES = [Policy.RECOMPUTE, Policy.OFFLOAD]

pytestmark = pytest.mark.usefixtures("everything_travels")


@cache
def reference() -> Result:
    return train(chain(NUM_BLOCKS, dropout=0.1), batches(2))


# -- equal, and really done


@pytest.mark.filterwarnings("error::lightning_superpipe.errors.SuperpipeWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (3, 2), (9, 3)])
def test_numbers_and_loads_are_those_of_keeping(policy: Policy, k: int, k_prime: int) -> None:
    module, lanes = chain(NUM_BLOCKS, dropout=0.1), ThreadLanes(CPU, None, max_delay_ms=0.5)
    with open_engine(module, lanes, k=k, k_prime=k_prime, choices=choices(policy)) as engine:
        assert is_equal(train(module, batches(2), partial(engine.step, "train")), reference())
        expected = 2 * (2 * NUM_BLOCKS - min(k, NUM_BLOCKS))
        assert engine.residency.num_loads == expected
        assert engine.residency.num_plan_misses == 0


@pytest.mark.parametrize("k", [2, NUM_BLOCKS])
@pytest.mark.parametrize("order", [*LANE_ORDERS, 0, 1], ids=str)
def test_recomputing_is_right_in_every_order_of_lanes(order: LaneOrder | int, k: int) -> None:
    # Without dropout: the emulation draws when the queue runs, after the generator has been put back.
    module, lanes = chain(NUM_BLOCKS), LateLanes(CPU, order)
    with open_engine(module, lanes, k=k, poison=False, choices=choices(Policy.RECOMPUTE)) as engine:
        lanes.attend(engine.gradients)
        around = partial(LateCompute, lanes, engine.slots)
        result = train(module, batches(2), partial(engine.step, "train"), around)
    assert is_equal(result, train(chain(NUM_BLOCKS), batches(2)))


@pytest.mark.parametrize("policy", POLICIES)
def test_autocast_is_restored(policy: Policy) -> None:
    around = partial(torch.autocast, "cpu", torch.bfloat16)
    expected = train(chain(NUM_BLOCKS, dropout=0.1), batches(2), around=around)
    module, lanes = chain(NUM_BLOCKS, dropout=0.1), ThreadLanes(CPU, None)
    with open_engine(module, lanes, choices=choices(policy)) as engine:
        assert is_equal(train(module, batches(2), partial(engine.step, "train"), around), expected)


class Counts(Block):
    """Counts its calls where no module sees it."""

    calls: ClassVar[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return super().forward(x)


@pytest.mark.parametrize(("policy", "num_calls"), [(Policy.KEEP, 1), (Policy.RECOMPUTE, 2), (Policy.OFFLOAD, 1)])
def test_a_unit_runs_again_only_where_it_recomputes(policy: Policy, num_calls: int) -> None:
    Counts.calls.clear()
    stream(made_of(Counts), policy, num_batches=1)
    assert len(Counts.calls) == num_calls


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_does_nothing_more(policy: Policy) -> None:
    Counts.calls.clear()
    module, lanes = made_of(Counts), ThreadLanes(CPU, None)
    with open_engine(module, lanes, choices=choices(policy, 3)) as engine, torch.no_grad():
        with engine.step("validate"):
            module(batches(1)[0])
        assert len(Counts.calls) == 1
        assert lanes.d2h_bytes == 0


# -- all that a call may be given and may return


class Nested(Block):
    """Takes keywords and containers, returns a dict of tuples; one input needs no gradient."""

    def forward(self, x: Tensor, *rest: Any, options: dict[str, Any] | None = None) -> Any:
        x = super().forward(x)
        if options is None:
            return x
        seen = options["seen"]
        seen.append(len(seen))
        return {"hidden": (x * options["scale"].values[0], None), "count": len(seen)}


@dataclass
class Scales:
    values: list[Tensor]
    name: str = "scales"


class Caller(Chain):
    """Hands nested arguments to its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen: list[int] = []
        scale = Scales([torch.ones_like(x) * 0.5])
        for block in self.blocks:
            output = block(x, options={"seen": self.seen, "scale": scale})
            x = output["hidden"][0]
        assert self.seen == list(range(len(self.blocks)))
        return x


def caller() -> Caller:
    torch.manual_seed(0)
    module = Caller(0)
    module.blocks.extend(Nested(dropout=0.1) for _ in range(3))
    return module


@pytest.mark.filterwarnings("error::lightning_superpipe.errors.SuperpipeWarning")
@pytest.mark.parametrize("policy", POLICIES)
def test_containers_dataclasses_and_keywords_pass(policy: Policy) -> None:
    module = caller()
    assert is_equal(stream(module, policy), train(caller(), batches(2)))
    assert module.seen == [0, 1, 2], "a list that units append to is appended to once"


class Twice(Chain):
    """Calls every block twice, the second time on frozen inputs."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + block(x.detach())
        return x


@pytest.mark.parametrize("policy", POLICIES)
def test_units_called_twice_and_inputs_without_gradient(policy: Policy) -> None:
    def twice() -> Twice:
        torch.manual_seed(0)
        return Twice(3, dropout=0.1)

    assert is_equal(stream(twice(), policy), train(twice(), batches(2)))


class ChecksItself(Block):
    """Has a checkpoint inside, or a compiled forward."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class ChecksItselfReentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=True)
        return result


@pytest.mark.filterwarnings("error::lightning_superpipe.errors.SuperpipeWarning")
@pytest.mark.parametrize("kind", [ChecksItself, ChecksItselfReentrant])
@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoints_inside_units(policy: Policy, kind: type[Block]) -> None:
    assert is_equal(stream(made_of(kind), policy), train(made_of(kind), batches(2)))


def gradients_of(engine: Engine | None, module: Chain) -> list[Tensor]:
    """Backward twice through one graph, after a gradient penalty through another."""
    torch.manual_seed(3)
    x = batches(1)[0].requires_grad_()
    step = partial(engine.step, "train") if engine else torch.enable_grad
    with step():
        loss = module(x).pow(2).mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        penalty = slope.pow(2).sum()
        penalty.backward()
        again = module(x).pow(2).mean()
    again.backward(retain_graph=True)
    again.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("policy", POLICIES)
def test_double_backward_and_kept_graphs(policy: Policy) -> None:
    expected = gradients_of(None, chain(NUM_BLOCKS, dropout=0.1))
    module = chain(NUM_BLOCKS, dropout=0.1)
    with open_engine(module, ThreadLanes(CPU, None, max_delay_ms=0.5), choices=choices(policy)) as engine:
        assert all(map(torch.equal, gradients_of(engine, module), expected))


# -- which unit does what


def test_the_first_pattern_that_matches_counts() -> None:
    names = ["wte", "h.0", "h.1", "head"]
    wish = {"h.1": "offload", "h.*": "recompute", "*": "keep"}
    assert choose_policies(wish, names) == [
        Choice(Policy.KEEP, False),
        Choice(Policy.RECOMPUTE, False),
        Choice(Policy.OFFLOAD, True),
        Choice(Policy.KEEP, False),
    ]
    assert choose_policies({"h.0": "recompute"}, names)[2:] == [Choice(), Choice()]
    assert choose_policies("auto", names) == [Choice(is_open=True)] * 4
    assert choose_policies({"h.0": "auto"}, names)[1] == Choice(is_open=True)
    assert {choice.policy for choice in choose_policies("auto", names, micro_batches=2)} == {Policy.RECOMPUTE}


def test_a_pattern_that_matches_no_unit_is_answered_with_the_units() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.\*' matches no unit. Units are 'h\.0', 'h\.1'\."):
        choose_policies({"layers.*": "recompute"}, ["h.0", "h.1"])
