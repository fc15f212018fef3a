"""What holds for the division of any module tree, however it shares modules, parameters and memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_superpipe.errors import PartitionError
from lightning_superpipe.partition import Partition, is_opaque, partition, unit_bytes, unit_table

Choice = Callable[[str, nn.Module], bool] | None

WIDTHS = (2, 3, 9)
SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


class Owner(nn.Module):
    """A module with a parameter of its own and named children."""

    def __init__(self, children: list[nn.Module], parameter: nn.Parameter | None) -> None:
        super().__init__()
        if parameter is not None:
            self.own = parameter
        for index, child in enumerate(children):
            setattr(self, f"c{index}", child)


LEAVES: tuple[Callable[[int], nn.Module], ...] = (
    lambda width: nn.Linear(width, width),
    lambda width: nn.LayerNorm(width),
    lambda width: nn.ReLU(),
    lambda width: nn.LSTM(width, width),
    lambda width: nn.MultiheadAttention(width, 1),
    lambda width: nn.ParameterList([torch.ones(width)]),
    lambda width: nn.LazyLinear(width),
    lambda width: nn.BatchNorm1d(width),
    lambda width: parametrizations.weight_norm(nn.Linear(width, width)),
    lambda width: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
)


def containers(children: list[nn.Module], parameter: nn.Parameter | None) -> dict[str, Callable[[], nn.Module]]:
    return {
        "list": lambda: nn.ModuleList(children),
        "chain": lambda: nn.Sequential(*children),
        "dict": lambda: nn.ModuleDict({f"k{index}": child for index, child in enumerate(children)}),
        "owner": lambda: Owner(children, parameter),
    }


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Containers of containers; now and then a module, a parameter or a parameter's memory is used again."""
    rarely = st.sampled_from([False, False, False, True])
    pool = [draw(st.sampled_from(LEAVES))(draw(st.sampled_from(WIDTHS))) for _ in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(1, 6))):
        picked = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
        children = [module if draw(rarely) else copy.deepcopy(module) for module in picked]
        own = nn.Parameter(torch.ones(3)) if draw(rarely) else None
        used = [p for module in pool for p in module.parameters() if not nn.parameter.is_lazy(p)]
        if used and draw(rarely):
            own = draw(st.sampled_from(used))
            own = nn.Parameter(own.data) if draw(rarely) else own
        make = containers(children, own)
        pool.append(make[draw(st.sampled_from(sorted(make)))]())
    return Owner(pool[-draw(st.integers(1, len(pool))) :], nn.Parameter(torch.ones(2)) if draw(rarely) else None)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """None, or some of the modules, chosen by a random but fixed property."""
    if draw(st.booleans()):
        return None
    kind = draw(st.sampled_from([nn.Linear, nn.Sequential, nn.ModuleList, Owner, nn.MultiheadAttention]))
    digit = draw(st.sampled_from(["", "0", "1"]))
    return lambda name, module: isinstance(module, kind) and digit in name


def divide(root: nn.Module, choice: Choice) -> Partition:
    try:
        return partition(root, choice)
    except PartitionError:
        assume(False)
        raise


@SETTINGS
@given(trees(), choices())
def test_every_parameter_streams_with_exactly_one_unit_or_is_an_anchor(root, choice):
    divided = divide(root, choice)
    num_units = Counter(id(parameter) for unit in divided.units for parameter in unit.module.parameters())
    for parameter in root.parameters():
        assert id(parameter) in divided.anchors or num_units[id(parameter)] == 1
    assert divided.anchors.keys() <= {id(parameter) for parameter in root.parameters()}


@SETTINGS
@given(trees(), choices())
def test_units_never_nest_and_come_in_order_of_registration(root, choice):
    divided = divide(root, choice)
    modules = [id(unit.module) for unit in divided.units]
    for unit in divided.units:
        inside = [id(module) for module in unit.module.modules()]
        assert set(inside) & set(modules) == {id(unit.module)}
    order = {id(module): (index, name) for index, (name, module) in enumerate(root.named_modules())}
    places = [order[key] for key in modules]
    assert places == sorted(places)
    assert [name for _, name in places] == [unit.name for unit in divided.units]
    assert id(root) not in modules


@SETTINGS
@given(trees(), choices())
def test_units_stream_something_and_never_lie_inside_an_opaque_module(root, choice):
    divided = divide(root, choice)
    hidden = {
        id(inner) for module in root.modules() if is_opaque(module) for inner in module.modules() if inner is not module
    }
    for unit in divided.units:
        assert unit_bytes(unit.module, divided.anchors) > 0
        assert id(unit.module) not in hidden


@SETTINGS
@given(trees())
def test_the_table_counts_every_byte_once(root):
    divided = divide(root, None)
    table = unit_table(root, divided)
    ready = [p for p in root.parameters() if not nn.parameter.is_lazy(p)]
    assert table.streamed_bytes + table.anchor_bytes == sum(p.nbytes for p in ready)
    assert [row.name for row in table if row.role == "unit"] == [unit.name for unit in divided.units]
