"""Anchors: a host tensor and a permanent device copy that follow each other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.anchors import Anchors
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from tests.engine.tiny import CPU, WIDTH, Block, Chain, batches, chain, is_equal, open_engine, train


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 6).t())


@pytest.fixture
def anchors(weight: nn.Parameter) -> Iterator[Anchors]:
    """Anchors on the CPU, where the copy is other memory as well."""
    lanes = ThreadLanes(CPU, None)

    def make_twin(host: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty(0, dtype=host.dtype), requires_grad=False)

    anchors = Anchors(CPU, lanes, {id(weight): "of the test"}, make_twin)
    yield anchors
    anchors.close()
    lanes.close()


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def h2d_bytes(anchors: Anchors) -> int:
    return anchors._lanes.h2d_bytes


# -- parameters


def test_copy_has_values_and_layout_of_its_host_and_memory_of_its_own(anchors: Anchors, weight: nn.Parameter) -> None:
    twin = anchors.twin(weight)
    assert torch.equal(twin, weight)
    assert (twin.stride(), twin.dtype) == (weight.stride(), weight.dtype)
    assert twin.data_ptr() != weight.data_ptr()
    assert anchors.host_of(twin) is weight
    assert anchors.host_of(weight) is None
    assert anchors.num_bytes == weight.nbytes


def test_copy_is_made_once_and_nothing_moves_while_nothing_changes(anchors: Anchors, weight: nn.Parameter) -> None:
    twin, moved = anchors.twin(weight), h2d_bytes(anchors)
    assert all(anchors.twin(weight) is twin for _ in range(3))
    assert h2d_bytes(anchors) == moved == weight.nbytes


@pytest.mark.parametrize("change", ["in place", "new memory", "fused step", "write through data"])
def test_copy_follows_its_host(anchors: Anchors, weight: nn.Parameter, change: str) -> None:
    twin = anchors.twin(weight)
    if change == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif change == "new memory":
        weight.data = weight.data * 2
    elif change == "fused step":
        weight.data.mul_(2)
        anchors.epoch += 1
    else:
        weight.data.mul_(2)
        anchors.invalidate()
    assert anchors.twin(weight) is twin
    assert torch.equal(twin, weight)


def test_copy_of_another_size_or_layout_gets_new_memory(anchors: Anchors, weight: nn.Parameter) -> None:
    twin = anchors.twin(weight)
    for data in (torch.randn(5), torch.randn(2, 3).t(), torch.randn(2, 3, 4)):
        weight.data = data
        assert anchors.twin(weight) is twin
        assert torch.equal(twin, data)
        assert twin.stride() == data.stride()


def test_copy_follows_freezing(anchors: Anchors, weight: nn.Parameter) -> None:
    assert anchors.twin(weight).requires_grad
    weight.requires_grad_(False)
    assert not anchors.twin(weight).requires_grad


def test_what_is_written_to_the_copy_goes_home(anchors: Anchors, weight: nn.Parameter) -> None:
    twin = anchors.twin(weight)
    with torch.no_grad():
        twin.fill_(0.5)
    anchors.bring_home(twin)
    anchors.twin(weight)
    assert weight.eq(0.5).all()
    assert anchors.num_copied_back == 1


def test_graph_made_with_an_older_value_is_an_error_as_ever(anchors: Anchors, weight: nn.Parameter) -> None:
    loss = anchors.twin(weight).pow(2).sum()
    with torch.no_grad():
        weight.mul_(2)
    anchors.twin(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(loss)


def test_graph_survives_a_refresh_without_a_change(anchors: Anchors, weight: nn.Parameter) -> None:
    twin = anchors.twin(weight)
    loss = twin.pow(2).sum()
    anchors.invalidate()
    anchors.twin(weight)
    (gradient,) = torch.autograd.grad(loss, twin)
    assert torch.equal(gradient, 2 * weight)


def test_closed_anchors_hold_no_memory_even_where_a_graph_does(anchors: Anchors, weight: nn.Parameter) -> None:
    twin = anchors.twin(weight)
    loss = twin.sum()
    anchors.close()
    assert anchors.num_bytes == 0
    assert twin.size() == weight.size()
    assert twin.untyped_storage().nbytes() == twin.itemsize
    assert anchors.host_of(twin) is None
    backward(loss)


# -- on a device of its own


class Tied(Chain):
    """A chain whose input and output share a table, with a scale of its own and a norm over batches."""

    def __init__(self) -> None:
        super().__init__(3)
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))
        for block in self.blocks:
            cast(Block, block).norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(super().forward(self.embed(x)) * self.scale))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def module() -> Tied:
    return tied()


@pytest.fixture
def engine(emu: torch.device, module: Tied) -> Iterator[Engine]:
    with open_engine(module, ThreadLanes(emu, None)) as engine:
        yield engine


def run(engine: Engine, module: nn.Module, mode: str = "train") -> Tensor:
    with engine.step(mode):
        return cast(Tensor, module(batches(1)[0].to(engine.device)))


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_anchors_and_buffers_is_exact(emu: torch.device, module: Tied, fused: bool) -> None:
    inputs = [x.to(emu) for x in batches(3)]
    plain = tied().to(emu)
    expected = train(plain, inputs, fused=fused)
    with open_engine(module, ThreadLanes(emu, None)) as engine:
        result = train(module, inputs, lambda: engine.step("train"), fused=fused)
    assert is_equal(result, expected._replace(weights=[weight.cpu() for weight in expected.weights]))
    for name, value in module.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, plain.state_dict()[name].cpu()), name


def test_gradients_of_anchors_land_at_home(engine: Engine, module: Tied) -> None:
    backward(run(engine, module).sum())
    for parameter in (module.embed.weight, module.scale):
        assert engine.catalog.is_anchor(parameter)
        assert parameter.grad is not None
        assert parameter.grad.device.type == "cpu"


def running_mean(module: Tied, index: int = 0) -> Tensor:
    return module.get_buffer(f"blocks.{index}.norm.running_mean")


def test_statistics_of_a_training_step_are_home_when_it_ends(engine: Engine, module: Tied) -> None:
    before = running_mean(module).clone()
    run(engine, module)
    assert running_mean(module).device.type == "cpu"
    assert not torch.equal(running_mean(module), before)


def test_statistics_written_at_home_are_read_on_the_device(engine: Engine, module: Tied) -> None:
    module.eval()
    run(engine, module, "validate")
    running_mean(module).fill_(3.0)
    reference = tied().to(engine.device).eval()
    running_mean(reference).fill_(3.0)
    result = run(engine, module, "validate")
    assert torch.equal(result, reference(batches(1)[0].to(engine.device)))
    running_mean(module).data.fill_(5.0)  # leaves no trace
    running_mean(reference).fill_(5.0)
    assert torch.equal(run(engine, module, "validate"), reference(batches(1)[0].to(engine.device)))
    assert running_mean(module).eq(5).all()


def test_buffers_replaced_in_forward_come_home(emu: torch.device) -> None:
    class Replaces(Block):
        last: Tensor
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Buffer(torch.zeros(4, WIDTH))
            self.count = nn.Buffer(torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.detach() * 2
            self.count += 1
            return super().forward(x)

    module = Chain(0)
    module.blocks.extend(Replaces() for _ in range(3))
    x = batches(1)[0].to(emu)
    with open_engine(module, ThreadLanes(emu, None)) as engine:
        for _ in range(2):
            run(engine, module)
        first = cast(Replaces, module.blocks[0])
        assert first.last.device.type == "cpu"
        assert torch.equal(first.last, x.cpu() * 2)
        assert first.count == 2


def test_taking_the_state_of_a_model_in_the_middle_of_a_step_makes_no_anchors(engine: Engine, module: Tied) -> None:
    known = len(engine.anchors.reasons)
    with engine.step("train"):
        module(batches(1)[0].to(engine.device))
        state = module.state_dict()
        state |= {f"copy of {name}": value for name, value in copy.deepcopy(module).named_parameters()}
        state |= {f"pickled {name}": value for name, value in pickle.loads(pickle.dumps(module)).named_parameters()}
    assert len(engine.anchors.reasons) == known
    assert {value.device.type for value in state.values()} == {"cpu"}


def test_close_brings_buffers_home_and_leaves_ordinary_parameters(emu: torch.device, module: Tied) -> None:
    parameters = list(module.parameters())
    with open_engine(module, ThreadLanes(emu, None)) as engine:
        loss = run(engine, module).sum()
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert engine.anchors.num_bytes == 0
    del loss


def test_chain_without_anchors_has_none(emu: torch.device) -> None:
    module = chain(3)
    with open_engine(module, ThreadLanes(emu, None)) as engine:
        backward(run(engine, module).sum())
        assert engine.anchors.num_bytes == 0
