"""A unit's host bytes and twins: one copy per unit, ordinary tensors at home, the same layout on the device."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.layout import lay_out, slot_bytes_of
from lightning_superpipe.engine.slots import ALIGNMENT, storage_key
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.engine.unit import Unit
from tests.engine.tiny import CPU, WIDTH, Block, Chain, batches, chain, engine_of, open_engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(chain(3), ThreadLanes(CPU, None)) as engine:
        yield engine


def loaded(engine: Engine, index: int = 0) -> Unit:
    """Return a unit whose bytes have arrived."""
    unit = engine.units[index]
    engine.residency.require(unit)
    assert unit.slot is not None
    return unit


def first(module: Chain) -> Block:
    """Return the first block, typed."""
    return cast(Block, module.blocks[0])


class Odd(nn.Module):
    """Parameters of every kind that a unit may have."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 5))
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.image = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.spectrum = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.mask = nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.index = nn.Parameter(torch.arange(5), requires_grad=False)
        self.short = nn.Parameter(torch.randn(7).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.matrix.sum() + self.image.mean() + self.scalar


@pytest.fixture
def odd() -> Iterator[Unit]:
    torch.manual_seed(0)
    root = nn.Module()
    root.blocks = nn.ModuleList(Odd() for _ in range(3))
    with open_engine(root, ThreadLanes(CPU, None)) as engine:
        yield loaded(engine)


# -- layout


def test_parameters_are_aligned_and_do_not_overlap() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 64, 65, 0, 3)]
    offsets, num_bytes = lay_out(parameters)
    assert offsets == [0, ALIGNMENT, 2 * ALIGNMENT, 4 * ALIGNMENT, 4 * ALIGNMENT]
    assert num_bytes == 5 * ALIGNMENT
    assert lay_out([]) == ([], 0)


def test_slot_bytes_are_those_of_streamed_parameters_only() -> None:
    block = Block()
    everything = slot_bytes_of(block, ())
    assert everything == engine_slot_bytes(chain(2))
    assert slot_bytes_of(block, {id(block.up.weight)}) == everything - 512  # 16 x 8 floats
    assert slot_bytes_of(block, {id(parameter) for parameter in block.parameters()}) == 0


def engine_slot_bytes(root: nn.Module) -> int:
    with open_engine(root, ThreadLanes(CPU, None)) as engine:
        return engine.slots.slot_bytes


# -- at home


def test_values_objects_and_layouts_survive_adoption() -> None:
    torch.manual_seed(0)
    root = nn.Module()
    root.blocks = nn.ModuleList(Odd() for _ in range(2))
    before = [(p, p.detach().clone(), p.stride()) for p in root.parameters()]
    engine = engine_of(root, ThreadLanes(CPU, None))
    for _ in range(2):
        after = list(root.parameters())
        assert all(now is then for now, (then, _, _) in zip(after, before, strict=True))
        assert all(torch.equal(p, value) and p.stride() == stride for p, value, stride in before)
        engine.close()  # and again at the end


def test_unit_travels_as_one_copy(engine: Engine) -> None:
    unit = loaded(engine)
    assert unit.slot is not None
    copies = unit.copies_to(unit.slot)
    assert len(copies) == 1
    assert copies[0].source.nbytes == copies[0].target.nbytes == unit.num_bytes


def test_every_parameter_has_a_storage_of_exactly_its_own_bytes() -> None:
    module = chain(2)
    with open_engine(module, ThreadLanes(CPU, None)):
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())
        file = io.BytesIO()
        torch.save(first(module).up.bias.detach(), file)
        assert file.tell() < 2000, "neighbours would be saved with it"


def test_memory_shared_with_others_stays_where_it_is() -> None:
    module = chain(2)
    weight = first(module).up.weight
    callbacks_copy = torch.zeros(2 * WIDTH, WIDTH)
    weight.data = callbacks_copy
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        assert storage_key(weight) == storage_key(callbacks_copy)
        callbacks_copy.fill_(0.5)
        unit = loaded(engine)
        assert unit.twin(2).eq(0.5).all()
        assert unit.parameters[2] is weight


def test_new_data_of_a_parameter_is_copied_from_where_it_is(engine: Engine) -> None:
    unit = engine.units[0]
    weight = unit.parameters[2]
    weight.data = torch.full_like(weight, 0.25)
    engine.invalidate()
    loaded(engine)
    assert unit.slot is not None
    assert len(unit.copies_to(unit.slot)) == 2
    assert unit.twin(2).eq(0.25).all()
    assert all(torch.equal(unit.twin(i), parameter) for i, parameter in enumerate(unit.parameters))


# -- on the device


def test_twins_of_any_kind_equal_their_hosts(odd: Unit) -> None:
    assert len(odd.parameters) == 9
    for index, host in enumerate(odd.parameters):
        twin = odd.twin(index)
        assert type(twin) is nn.Parameter
        assert (twin.dtype, twin.size(), twin.stride()) == (host.dtype, host.size(), host.stride())
        assert twin.requires_grad == host.requires_grad
        assert torch.equal(twin, host)
        assert not host.numel() or twin.data_ptr() != host.data_ptr()


def test_twin_is_made_once_and_follows_its_unit_through_slots(engine: Engine) -> None:
    unit = loaded(engine)
    identity = id(unit.twin(0))
    engine.residency.evict(unit)
    assert unit.twin(0).isnan().all(), "the slot that it points at is poisoned"
    loaded(engine, 1)
    loaded(engine)
    assert id(unit.twin(0)) == identity
    assert torch.equal(unit.twin(0), unit.parameters[0])


def test_twin_follows_freezing_and_shares_attributes(engine: Engine) -> None:
    unit = engine.units[0]
    host = unit.parameters[0]
    assert unit.twin(0).requires_grad
    host.requires_grad_(False)
    assert not unit.twin(0).requires_grad
    host.__dict__["note"] = "of the user"
    assert unit.twin(0).__dict__["note"] == "of the user"


def test_binding_puts_twins_in_and_unbinding_takes_them_out(engine: Engine) -> None:
    unit = loaded(engine)
    hosts = list(unit.module.parameters())
    unit.bind(None)
    assert unit.is_bound
    assert all(now is unit.twin(index) for index, now in enumerate(unit.module.parameters()))
    unit.unbind(engine.catalog.host_of)
    assert all(now is then for now, then in zip(unit.module.parameters(), hosts, strict=True))


def test_parameter_put_in_place_by_the_user_is_left_there(engine: Engine) -> None:
    unit = loaded(engine)
    linear = cast(nn.Linear, unit.module.get_submodule("up"))
    unit.bind(None)
    mine = nn.Parameter(torch.zeros_like(linear.weight))
    linear.weight = mine
    unit.unbind(engine.catalog.host_of)
    assert linear.weight is mine
    assert not unit.is_current()


@pytest.mark.parametrize("change", ["add", "replace", "remove", "resize", "cast"])
def test_scan_is_outdated_when_parameters_change(engine: Engine, change: str) -> None:
    unit = loaded(engine)
    up = cast(nn.Linear, unit.module.get_submodule("up"))
    assert unit.is_current()
    if change == "add":
        up.late = nn.Parameter(torch.zeros(3))
    elif change == "replace":
        up.weight = nn.Parameter(torch.zeros_like(up.weight))
    elif change == "remove":
        up.bias = None  # type: ignore[assignment]
    elif change == "resize":
        up.weight.data = torch.zeros(1, 1)
    else:
        unit.module.to(torch.float64)
    assert not unit.is_current()


def test_growing_unit_gets_larger_slots_and_is_exact() -> None:
    module, x = chain(3), batches(1)[0]
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        before = engine.slots.slot_bytes
        wide = nn.Sequential(nn.Linear(WIDTH, 20 * WIDTH), nn.Linear(20 * WIDTH, WIDTH))
        cast(Block, module.blocks[1]).down = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), wide)  # type: ignore[assignment]
        with engine.step("train"):
            y = module(x)
        y.sum().backward()
        assert engine.slots.slot_bytes > 4 * before
        streamed = [cast(Tensor, parameter.grad).clone() for parameter in module.parameters()]
    module.zero_grad()
    assert torch.equal(y, module(x))
    module(x).sum().backward()
    assert all(torch.equal(g, cast(Tensor, p.grad)) for g, p in zip(streamed, module.parameters(), strict=True))


# -- recurrent layers


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_second_list_of_recurrent_weights_follows_the_binding(kind: Callable[[int, int], nn.RNNBase]) -> None:
    torch.manual_seed(0)
    root = nn.Module()
    root.layers = nn.ModuleList(kind(WIDTH, WIDTH) for _ in range(2))
    layer = cast(nn.RNNBase, root.layers[0])
    x = torch.randn(5, 2, WIDTH)
    expected = layer(x)[0]
    with open_engine(root, ThreadLanes(CPU, None), k=1) as engine:
        unit = loaded(engine)
        unit.bind(None)
        assert all(flat is unit.twin(i) for i, flat in enumerate(layer._flat_weights))
        unit.unbind(engine.catalog.host_of)
        assert all(flat is host for flat, host in zip(layer._flat_weights, layer.parameters(), strict=True))
        assert torch.equal(layer(x)[0], expected)
    assert torch.equal(layer(x)[0], expected)


# -- what the loads compare


def test_stamp_changes_with_each_kind_of_update(engine: Engine) -> None:
    unit = loaded(engine)
    weight = unit.parameters[0]
    stamps = {unit.current_stamp()}
    with torch.no_grad():
        weight.add_(1)
    stamps.add(unit.current_stamp())
    weight.data = torch.zeros_like(weight)
    stamps.add(unit.current_stamp())
    unit.epoch += 1  # a fused optimizer leaves no other trace
    stamps.add(unit.current_stamp())
    assert len(stamps) == 4


def test_weights_written_on_the_device_go_home(engine: Engine) -> None:
    unit = loaded(engine)
    engine.units[0].bind(None)
    with torch.no_grad():
        unit.twin(0).fill_(0.125)
    engine.residency.evict(unit)
    assert unit.parameters[0].eq(0.125).all()
    assert engine.residency.num_copied_back == 1
    loaded(engine)
    assert unit.twin(0).eq(0.125).all()


def test_stashed_twin_gets_memory_of_its_own_and_gives_it_back(engine: Engine) -> None:
    unit = loaded(engine)
    held = unit.twin(0)
    value = held.detach().clone()
    assert unit.stashed_twins() == [0]
    engine.residency.evict(unit)
    assert unit.has_own_storage == {0}
    assert torch.equal(held, value), "its holder may read it at any time"
    del held
    loaded(engine)
    assert unit.has_own_storage == set()
    assert unit.stashed_twins() == []


def test_graph_does_not_count_as_a_holder() -> None:
    module, x = chain(2), batches(1)[0]
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        with engine.step("train"):
            y = module(x)
        assert engine.residency.num_stashed == 0
        y.sum().backward()
        assert engine.residency.num_stashed == 0
    assert isinstance(module, Chain)
