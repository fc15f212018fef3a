"""The rule that divides a model, on modules made for one clause each, and the user's own choice of units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from lightning_superpipe.errors import PartitionError
from lightning_superpipe.partition import Partition, is_opaque, partition, unit_bytes

D = 8


class Block(nn.Module):
    """Two matrices, as a transformer block in small."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Net(nn.Module):
    """Children given by name, and direct parameters."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def blocks(count: int, width: int = D) -> nn.ModuleList:
    return nn.ModuleList(Block(width) for _ in range(count))


def stage(count: int, width: int = D) -> Net:
    """A stage as in ConvNeXt: a small entry and a series of layers."""
    return Net(entry=nn.LayerNorm(width), layers=blocks(count, width))


def names(divided: Partition) -> list[str]:
    return [unit.name for unit in divided.units]


def anchor_names(root: nn.Module, divided: Partition) -> dict[str, str]:
    return {name: divided.anchors[id(p)] for name, p in root.named_parameters() if id(p) in divided.anchors}


# ---- the automatic rule


def test_children_of_a_series_and_what_stands_beside_it_are_units_in_registration_order():
    root = Net(embed=nn.Embedding(5, D), blocks=blocks(3), norm=nn.LayerNorm(D), head=nn.Linear(D, 5))
    divided = partition(root)
    assert names(divided) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert divided.anchors == {}
    assert [unit.module for unit in divided.units[1:4]] == list(root.blocks)


@pytest.mark.parametrize("container", [lambda parts: nn.Sequential(*parts), nn.ModuleList], ids=["chain", "list"])
def test_a_root_that_is_a_series_itself_is_divided_into_its_blocks(container):
    assert names(partition(container([Block(), Block()]))) == ["0", "1"]


def test_a_series_is_found_in_a_dict_and_holds_blocks_of_other_classes_too():
    experts = nn.ModuleDict({"a": Block(), "b": Block(), "router": nn.Linear(D, 2), "act": nn.ReLU()})
    assert names(partition(Net(experts=experts))) == ["experts.a", "experts.b", "experts.router"]


def test_children_of_different_classes_are_no_series():
    root = Net(small=nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)]), blocks=blocks(2))
    assert names(partition(root)) == ["small", "blocks.0", "blocks.1"]


def test_stages_are_opened_to_their_layers():
    root = Net(stages=nn.ModuleList([stage(2), stage(2, 2 * D)]))
    expected = [f"stages.{i}.{part}" for i in range(2) for part in ("entry", "layers.0", "layers.1")]
    assert names(partition(root)) == expected


def test_a_series_of_series_is_opened_to_the_innermost_blocks():
    root = Net(body=nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())))
    assert names(partition(root)) == ["body.0.0", "body.0.1", "body.1.0", "body.1.1"]


def test_a_block_stays_whole_if_its_series_has_single_matrices():
    root = Net(stack=nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)) for _ in range(2)))
    assert names(partition(root)) == ["stack.0", "stack.1"]


def test_a_block_stays_whole_if_its_series_holds_less_than_half_of_it():
    heavy = [Net(dense=nn.Linear(20 * D, 20 * D), layers=blocks(2)) for _ in range(2)]
    assert names(partition(Net(stages=nn.ModuleList(heavy)))) == ["stages.0", "stages.1"]


def test_experts_inside_a_block_are_units_where_they_are_most_of_it():
    layer = [
        Net(attn=nn.MultiheadAttention(D, 2), experts=nn.ModuleDict({n: Block() for n in "abcd"})) for _ in range(2)
    ]
    expected = [f"layers.{i}.{part}" for i in range(2) for part in ("attn", *(f"experts.{n}" for n in "abcd"))]
    assert names(partition(Net(layers=nn.ModuleList(layer)))) == expected


def test_two_towers_give_the_units_of_both():
    root = Net(text=Net(emb=nn.Embedding(5, D), layers=blocks(2)), image=Net(conv=nn.Conv2d(3, D, 2), layers=blocks(2)))
    expected = ["text.emb", "text.layers.0", "text.layers.1", "image.conv", "image.layers.0", "image.layers.1"]
    assert names(partition(root)) == expected


def test_stages_of_a_unet_are_units_down_and_up():
    down, up = nn.ModuleList([Block(4), Block(8)]), nn.ModuleList([Block(8), Block(4)])
    root = Net(down=down, middle=Block(8), up=up)
    assert names(partition(root)) == ["down.0", "down.1", "middle", "up.0", "up.1"]


def test_a_subtree_without_blocks_is_split_while_it_is_larger_than_block_and_eighth():
    large = Net(first=nn.Linear(D, 40 * D), second=Net(a=nn.Linear(40 * D, D), b=nn.LayerNorm(D)))
    large.scale = nn.Parameter(torch.ones(D))
    root = Net(head=large, blocks=blocks(2))
    divided = partition(root)
    assert names(divided) == ["head.first", "head.second.a", "head.second.b", "blocks.0", "blocks.1"]
    assert anchor_names(root, divided) == {"head.scale": "outside units"}


def test_a_subtree_no_larger_than_the_largest_block_stays_whole():
    small = Net(a=nn.Linear(D, D), b=nn.Linear(D, D))
    assert names(partition(Net(head=small, blocks=blocks(2)))) == ["head", "blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(D, D, 2),
        lambda: nn.MultiheadAttention(D, 2),
        lambda: nn.TransformerEncoderLayer(D, 2),
        lambda: nn.TransformerDecoderLayer(D, 2),
        lambda: torch.compile(nn.Sequential(Block(), Block()), backend="eager"),
        lambda: parametrizations.weight_norm(Net(weight=nn.Parameter(torch.ones(D, D)), blocks=blocks(2))),
        lambda: torch.compile(parametrizations.weight_norm(nn.Linear(D, D)), backend="eager"),
    ],
    ids=["lstm", "attention", "encoder layer", "decoder layer", "compiled", "parametrised", "compiled parametrised"],
)
def test_an_opaque_module_is_one_unit_whatever_its_size(make):
    opaque = make()
    assert is_opaque(opaque)
    assert names(partition(Net(small=nn.Linear(2, 2), opaque=opaque))) == ["small", "opaque"]


def test_transformer_layers_are_units():
    root = Net(net=nn.Transformer(D, 2, 2, 2, dim_feedforward=D, batch_first=True))
    expected = [f"net.{s}.{part}" for s in ("encoder", "decoder") for part in ("layers.0", "layers.1", "norm")]
    assert names(partition(root)) == expected


def test_an_opaque_module_in_a_split_subtree_stays_whole():
    root = Net(head=Net(layer=nn.TransformerEncoderLayer(4 * D, 2), out=nn.Linear(4 * D, 2)), blocks=blocks(2))
    assert names(partition(root)) == ["head.layer", "head.out", "blocks.0", "blocks.1"]


def test_a_series_inside_a_compiled_module_is_not_seen():
    compiled = [torch.compile(stage(2), backend="eager") for _ in range(2)]
    wrapped = Net(inner=torch.compile(nn.Sequential(Block(), Block()), backend="eager"), out=nn.Linear(D, D))
    root = Net(compiled=nn.ModuleList(compiled), wrapped=wrapped, blocks=blocks(2, 4 * D))
    assert names(partition(root)) == ["compiled.0", "compiled.1", "wrapped", "blocks.0", "blocks.1"]


def test_parametrised_layers_are_of_one_class_with_each_other():
    layers = nn.ModuleList(parametrizations.weight_norm(nn.Linear(D, D)) for _ in range(3))
    root = Net(layers=layers, blocks=blocks(2, 4 * D))
    assert names(partition(root)) == ["layers.0", "layers.1", "layers.2", "blocks.0", "blocks.1"]


def test_layers_with_the_older_weight_norm_stream():
    with pytest.warns(FutureWarning, match="weight_norm"):
        root = Net(layers=nn.ModuleList(weight_norm(nn.Linear(D, D)) for _ in range(2)))
    divided = partition(root)
    assert names(divided) == ["layers.0", "layers.1"]
    assert divided.anchors == {}


def test_a_parametrised_root_is_still_divided():
    root = Net(weight=nn.Parameter(torch.ones(D, D)), blocks=blocks(2))
    parametrizations.spectral_norm(root)
    divided = partition(root)
    assert names(divided) == ["blocks.0", "blocks.1"]
    assert anchor_names(root, divided) == {"parametrizations.weight.original": "outside units"}


def test_a_module_registered_twice_is_one_unit():
    shared = Block()
    assert names(partition(Net(a=shared, b=shared, blocks=nn.ModuleList([shared, Block()])))) == ["a", "blocks.1"]


def test_an_alias_of_a_part_streams_with_the_unit_around_it():
    body = Net(first=nn.Linear(D, D), second=nn.Linear(D, D))
    root = Net(alias=body.second, body=body, blocks=blocks(3))
    divided = partition(root)
    assert names(divided) == ["body", "blocks.0", "blocks.1", "blocks.2"]
    assert divided.anchors == {}


def test_a_unit_of_tied_weights_alone_disappears():
    root = Net(embed=nn.Embedding(5, D), blocks=blocks(2), head=nn.Linear(D, 5, bias=False))
    root.head.weight = root.embed.weight
    divided = partition(root)
    assert names(divided) == ["blocks.0", "blocks.1"]
    assert anchor_names(root, divided) == {"embed.weight": "shared by units"}


def test_unit_bytes_count_what_streams():
    block = Block()
    everything = sum(parameter.nbytes for parameter in block.parameters())
    assert unit_bytes(block, {}) == everything
    assert unit_bytes(block, {id(block.up.weight): "shared by units"}) == everything - block.up.weight.nbytes


# ---- by hand


@pytest.fixture
def model() -> Net:
    return Net(net=Net(embed=nn.Embedding(5, D), h=blocks(2), scale=nn.Parameter(torch.ones(D))), head=nn.Linear(D, 5))


BLOCKS = ["net.embed", "net.h.0", "net.h.1", "head"]


@pytest.mark.parametrize(
    "units", ["Block", "net.h.*", ["net.h.0", "net.h.1"], ["net.h.0*", "Block"], lambda name, module: "h." in name]
)
def test_blocks_are_chosen_by_class_name_pattern_list_and_callable(model, units):
    divided = partition(model, units)
    assert names(divided) == BLOCKS
    assert anchor_names(model, divided) == {"net.scale": "outside units"}


def test_a_pattern_counts_for_the_outermost_match(model):
    assert names(partition(model, "net*")) == ["net", "head"]


def test_a_module_is_known_by_each_of_its_names():
    shared = Block()
    assert names(partition(Net(a=shared, alias=shared, rest=nn.Linear(D, D)), "alias")) == ["a", "rest"]


def test_what_is_beside_chosen_parts_of_a_block_streams_too(model):
    divided = partition(model, "*.up")
    assert names(divided) == [
        "net.embed",
        *(f"net.h.{i}.{part}" for i in range(2) for part in ("norm", "up", "down")),
        "head",
    ]


def test_stacks_that_were_not_chosen_follow_the_rule():
    root = Net(encoder=Net(layers=blocks(2)), decoder=Net(layers=blocks(2)))
    divided = partition(root, "decoder")
    assert names(divided) == ["encoder.layers.0", "encoder.layers.1", "decoder"]


def test_a_choice_inside_an_opaque_module_takes_that_module():
    root = Net(layers=nn.ModuleList(nn.TransformerEncoderLayer(D, 2) for _ in range(2)), head=nn.Linear(D, 2))
    assert names(partition(root, "Linear")) == ["layers.0", "layers.1", "head"]


def test_the_callable_sees_every_module_but_the_root(model):
    seen = []
    partition(model, lambda name, module: seen.append((name, module)) or name == "head")
    assert seen == [(name, module) for name, module in model.named_modules() if module is not model]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("Blok", "units='Blok' matches none of the 13 modules inside Net: did you mean 'Block'?"),
        ("net.h.7", "did you mean 'net.h.1' or 'net.h.0'"),
        ("nett.h.*", "did you mean 'net.h.1' or 'net.h.0'"),
        (["Block", "zzz"], "units='zzz' matches none .* Classes and names here: Net, Embedding, .* and 10 more"),
        (lambda name, module: False, r"units=<lambda>\(name, module\) matches none of the 13 modules"),
        ("ReLU", r"matches 1 module\(s\), but none that can be a unit: they own no parameters"),
        (Block, "Did you mean units='Block'"),
        ([], "at least one"),
        (3, "units=3: allowed are a class name"),
    ],
)
def test_a_choice_that_gives_nothing_is_answered_with_what_there_is(model, units, message):
    model.act = nn.ReLU()
    with pytest.raises(PartitionError, match=message):
        partition(model, units)


def test_the_model_itself_cannot_be_chosen(model):
    with pytest.raises(PartitionError, match="units='Net' is the model itself, which is never a unit"):
        partition(model.net, "Net")


# ---- nothing to stream


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (Net(scale=nn.Parameter(torch.ones(3))), "no units found in Net.*1 outside units.*Put the layers into child"),
        (nn.Linear(2, 2), "no units found in Linear.*2 outside units"),
        (nn.ReLU(), "no units found: ReLU owns no parameters"),
        (nn.LSTM(2, 2), "no units found in LSTM.*LSTM cannot be split"),
        (torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"), "OptimizedModule cannot be split"),
        (nn.Sequential(nn.LazyLinear(2)), "2 lazy.*Run one batch"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), r"2 meta.*to_empty"),
    ],
    ids=["direct", "bare", "empty", "opaque", "compiled", "lazy", "meta"],
)
def test_a_model_without_units_is_refused_with_a_way_out(root, message):
    with pytest.raises(PartitionError, match=message):
        partition(root)
