"""Gradients go home: complete, in memory used again, and as autograd itself would have put them there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.config import Link
from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.lanes import Copy, Event, Label
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import HostTier
from tests.engine.held_lanes import HeldLanes
from tests.engine.tiny import CPU, batches, chain, open_engine, train

LABEL = Label("G", 3, "net.h.3")
LIMIT_BYTES = 256


class Way(NamedTuple):
    """The way home, and what it uses."""

    gradients: GradientReturn
    lanes: ThreadLanes
    tier: HostTier

    def ship(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.gradients.ship(parameter, gradient, LABEL)

    def close(self) -> None:
        self.gradients.close()
        self.lanes.close()
        self.tier.close()


def way_over(lanes: ThreadLanes) -> Way:
    tier = HostTier(pin=False)
    return Way(GradientReturn(lanes, tier, limit_bytes=LIMIT_BYTES, pin=False), lanes, tier)


@pytest.fixture
def way() -> Iterator[Way]:
    way = way_over(ThreadLanes(CPU, Link()))
    yield way
    way.close()


def weight(*size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=dtype))


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# -- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [(), (3,), (2, 5), (0, 4)])
def test_gradient_lands_with_its_values(way: Way, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    parameter, gradient = weight(*size, dtype=dtype), torch.randn(size, dtype=dtype)
    way.ship(parameter, gradient.clone())
    way.gradients.finish()
    assert torch.equal(grad_of(parameter), gradient)
    assert grad_of(parameter).dtype is dtype


def test_layout_of_a_gradient_is_kept(way: Way) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    gradient = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for each in (gradient, torch.randn(2, 3, 4, 4)):  # and one that is laid out in another way than its parameter
        parameter.grad = None
        way.ship(parameter, each.clone())
        way.gradients.finish()
        assert torch.equal(grad_of(parameter), each)
        assert grad_of(parameter).stride() == each.stride()


def test_gradients_add_up_in_the_order_of_their_coming(way: Way) -> None:
    parameter, shipped = weight(64), [torch.randn(64) * 10**power for power in range(6)]
    for gradient in shipped[:3]:
        way.ship(parameter, gradient.clone())  # in one backward pass
    way.gradients.finish()
    for gradient in shipped[3:]:
        way.ship(parameter, gradient.clone())  # in one pass each
        way.gradients.finish()
    expected = shipped[0].clone()
    for gradient in shipped[1:]:
        expected.add_(gradient)
    assert torch.equal(grad_of(parameter), expected)


def test_adding_goes_into_the_tensor_that_the_user_holds(way: Way) -> None:
    parameter = weight(4)
    held = parameter.grad = torch.ones(4)
    way.ship(parameter, torch.ones(4))
    way.gradients.finish()
    assert parameter.grad is held
    assert held.eq(2).all()


# -- hooks of the user


def add_hook(parameter: nn.Parameter, hook: Callable[[Any], Any], *, after: bool = False) -> None:
    register: Any = parameter.register_post_accumulate_grad_hook if after else parameter.register_hook
    register(hook)


def test_tensor_hook_sees_each_gradient_at_once_and_may_change_it(way: Way) -> None:
    parameter, seen = weight(2), []

    def double(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2

    add_hook(parameter, double)
    way.ship(parameter, torch.ones(2))
    assert grad_of(parameter).eq(2).all(), "there before anybody waits"
    way.ship(parameter, torch.ones(2))
    assert grad_of(parameter).eq(4).all()
    assert [gradient.tolist() for gradient in seen] == [[1, 1], [1, 1]]


def test_hooks_run_in_order_and_the_last_sees_the_sum(way: Way) -> None:
    parameter, log = weight(1), []
    add_hook(parameter, lambda gradient: log.append("first"))
    add_hook(parameter, lambda gradient: log.append("second"))
    add_hook(parameter, lambda p: log.append(f"sum {grad_of(p).item():g}"), after=True)
    way.ship(parameter, torch.ones(1))
    way.ship(parameter, torch.ones(1))
    assert log == ["first", "second", "sum 1", "first", "second", "sum 2"]


def test_gradient_with_hooks_comes_after_those_shipped_before(way: Way) -> None:
    ordinary, hooked = weight(2), weight(2)
    seen: list[Any] = []
    add_hook(hooked, lambda gradient: seen.append(ordinary.grad))
    way.ship(ordinary, torch.ones(2))
    way.ship(hooked, torch.ones(2))
    assert seen[0] is not None


def test_hooked_parameter_may_have_gradients_on_their_way(way: Way) -> None:
    parameter = weight(2)
    way.ship(parameter, torch.ones(2))
    add_hook(parameter, lambda gradient: gradient * 10)
    way.ship(parameter, torch.ones(2))
    way.gradients.finish()
    assert grad_of(parameter).eq(11).all()


# -- gradients that no lane can carry


def sparse_row() -> Tensor:
    """Return a sparse (4, 2) gradient with ones in its second row."""
    return torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True)


def test_sparse_gradients_land_and_add_up(way: Way) -> None:
    parameter = weight(4, 2)
    way.ship(parameter, sparse_row())
    way.ship(parameter, sparse_row())
    assert grad_of(parameter).is_sparse
    assert grad_of(parameter).to_dense().tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "is_sparse_first",
    [False, True],
)
def test_sparse_and_dense_gradients_of_one_parameter_add_up(way: Way, is_sparse_first: bool) -> None:
    parameter = weight(4, 2)
    for is_sparse in (is_sparse_first, not is_sparse_first):
        way.ship(parameter, sparse_row() if is_sparse else torch.ones(4, 2))
    way.gradients.finish()
    assert grad_of(parameter).to_dense().tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]


def test_differentiable_gradient_keeps_its_graph(way: Way) -> None:
    parameter, x = weight(2), torch.ones(2, requires_grad=True)
    with torch.enable_grad():
        way.ship(parameter, x * 3)
    assert grad_of(parameter).requires_grad
    assert torch.autograd.grad(grad_of(parameter).sum(), x)[0].eq(3).all()


# -- memory


def addresses(parameters: Sequence[nn.Parameter]) -> list[int]:
    return [grad_of(parameter).data_ptr() for parameter in parameters]


def test_gradients_of_a_unit_share_one_slab_and_it_is_used_again(way: Way) -> None:
    unit = [weight(16), weight(4, 4), weight(3)]
    way.gradients.add_group(unit)
    used: list[list[int]] = []
    taken: list[int] = []
    for step in range(5):
        for parameter in reversed(unit):
            way.ship(parameter, torch.full_like(parameter.detach(), float(step)))
        way.gradients.finish()
        used.append(addresses(unit))
        taken.append(way.tier.allocated_bytes)
        for parameter in unit:
            assert grad_of(parameter).eq(step).all()
            parameter.grad = None
    assert all(each == used[0] for each in used)
    assert taken == [taken[0]] * 5, "no host memory is taken after the first step"
    assert max(used[0]) - min(used[0]) < taken[0]


def test_frozen_parameters_of_a_unit_take_no_memory(way: Way) -> None:
    unit = [weight(64), weight(64)]
    unit[1].requires_grad_(False)
    way.gradients.add_group(unit)
    way.ship(unit[0], torch.ones(64))
    way.gradients.finish()
    assert way.tier.allocated_bytes == 256
    unit[1].requires_grad_(True)  # and thawed later
    way.ship(unit[1], torch.ones(64))
    way.gradients.finish()
    assert grad_of(unit[1]).eq(1).all()


@pytest.mark.parametrize(
    "keep", [lambda g: g, lambda g: g[1:], lambda g: g.numpy(), lambda g: g.detach(), lambda g: [g]]
)
def test_a_kept_gradient_does_not_change_later(way: Way, keep: Any) -> None:
    parameter = weight(4)
    way.ship(parameter, torch.ones(4))
    way.gradients.finish()
    kept = keep(grad_of(parameter))
    parameter.grad = None
    way.ship(parameter, torch.full((4,), 7.0))
    way.gradients.finish()
    assert torch.as_tensor(kept[0] if isinstance(kept, list) else kept).eq(1).all()
    assert grad_of(parameter).eq(7).all()


def test_memory_of_a_kept_gradient_is_replaced_once(way: Way) -> None:
    parameter, kept = weight(64), []
    for step in range(4):
        way.ship(parameter, torch.full((64,), float(step)))
        way.gradients.finish()
        if step == 0:
            kept.append(grad_of(parameter))
        parameter.grad = None
    assert way.tier.allocated_bytes == 2 * 256
    assert kept[0].eq(0).all()


def test_training_takes_no_host_memory_after_its_first_step() -> None:
    module, taken = chain(4), []
    with open_engine(module, ThreadLanes(CPU, Link())) as engine:
        for _ in range(4):
            train(module, batches(2), partial(engine.step, "train"))
            taken.append(engine._tier.allocated_bytes)
    assert len(set(taken)) == 1


# -- waiting on the device


class Counting(HeldLanes):
    """Notes how much waits when a gradient is shipped."""

    def __init__(self) -> None:
        super().__init__(CPU, Lane.D2H)


def test_gradients_that_wait_are_limited() -> None:
    way = way_over(Counting())
    assert isinstance(way.lanes, HeldLanes)
    way.lanes.attend(way.gradients)
    waiting = []
    parameters = [weight(16) for _ in range(12)]
    for parameter in parameters:
        way.ship(parameter, torch.ones(16))
        waiting.append(way.gradients.in_flight_bytes)
    way.gradients.finish()
    assert max(waiting) == way.gradients.peak_in_flight_bytes == LIMIT_BYTES
    assert way.gradients.in_flight_bytes == 0
    assert all(grad_of(parameter).eq(1).all() for parameter in parameters)
    way.close()


def test_gradient_larger_than_the_limit_goes_alone() -> None:
    way = way_over(Counting())
    assert isinstance(way.lanes, HeldLanes)
    way.lanes.attend(way.gradients)
    small, large = weight(16), weight(1000)
    way.ship(small, torch.ones(16))
    way.ship(large, torch.ones(1000))
    assert way.gradients.in_flight_bytes == 4000
    way.ship(small, torch.ones(16))
    assert way.gradients.in_flight_bytes == 64
    way.gradients.finish()
    assert grad_of(small).eq(2).all()
    way.close()


# -- failed copies


class Failing(ThreadLanes):
    """Fails when told."""

    fails = False

    def d2h(self, copies: Sequence[Copy], *, after: Sequence[Event], label: Label) -> Event:
        if self.fails:
            copies = [Copy(torch.empty(1, 1, 1), torch.empty(2))]
        return super().d2h(copies, after=after, label=label)


def test_failed_copy_is_an_error_that_names_the_unit_and_the_next_pass_works() -> None:
    lanes = Failing(CPU, Link())
    way = way_over(lanes)
    first, second = weight(4), weight(4)
    lanes.fails = True
    way.ship(first, torch.ones(4))
    way.gradients.flush()
    lanes.fails = False
    way.ship(second, torch.ones(4))
    with pytest.raises(TransferError, match=r"net\.h\.3"):
        way.gradients.finish()
    assert first.grad is None
    way.ship(first, torch.ones(4))
    way.gradients.finish()
    assert grad_of(first).eq(1).all()
    way.close()


def test_nothing_waits_after_a_failed_copy() -> None:
    lanes = Failing(CPU, Link())
    way = way_over(lanes)
    lanes.fails = True
    way.ship(weight(4), torch.ones(4))
    with pytest.raises(TransferError):
        way.gradients.finish()
    try:
        assert way.gradients.in_flight_bytes == 0
    finally:
        way.close()


def test_failed_copy_ends_the_backward_pass_of_an_engine() -> None:
    module, lanes = chain(4), Failing(CPU, Link())
    with open_engine(module, lanes) as engine:
        with engine.step("train"):
            loss = module(batches(1)[0]).sum()
        lanes.fails = True
        with pytest.raises(TransferError, match="blocks"):
            loss.backward()
        lanes.fails = False
        for parameter in module.parameters():
            parameter.grad = None
        with engine.step("train"):
            loss = module(batches(1)[0]).sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_close_finishes_what_is_on_its_way_and_ends_the_thread() -> None:
    before = threading.active_count()
    way, parameter = way_over(ThreadLanes(CPU, None, max_delay_ms=1.0)), weight(4)
    way.ship(parameter, torch.ones(4))
    way.close()
    assert grad_of(parameter).eq(1).all()
    assert threading.active_count() == before
