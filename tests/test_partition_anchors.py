"""Every reason for which a parameter does not stream, and the parameters that are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.partition import is_streamable, partition


def model() -> nn.Module:
    """Two units that stream whatever happens to the first one's weight."""
    root = nn.Module()
    root.first, root.second = nn.Linear(3, 3), nn.Linear(3, 3)
    return root


def anchors(root: nn.Module) -> dict[str, str]:
    reasons = partition(root).anchors
    return {name: reasons[id(p)] for name, p in root.named_parameters() if id(p) in reasons}


# ---- who uses it


def test_a_parameter_of_two_units_is_shared():
    root = model()
    root.second.weight = root.first.weight
    assert anchors(root) == {"first.weight": "shared by units"}


def test_a_parameter_of_a_unit_and_the_model_itself_is_shared():
    root = model()
    root.tied = root.first.weight
    assert anchors(root) == {"tied": "shared by units"}


def test_a_module_inside_two_units_is_shared():
    root, common = model(), nn.Linear(2, 2)
    root.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), common) for _ in range(2))
    root.blocks.append(nn.Sequential(nn.Linear(3, 3)))
    assert anchors(root) == {name: "shared by units" for name in ("blocks.0.2.weight", "blocks.0.2.bias")}


def test_a_parameter_used_twice_inside_one_unit_streams():
    root = model()
    root.pair = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)])
    root.pair[0][1].weight = root.pair[0][0].weight
    assert anchors(root) == {}


def test_direct_parameters_of_the_root_and_of_descended_modules_are_outside():
    root = model()
    root.scale = nn.Parameter(torch.ones(3))
    root.stack = nn.Module()
    root.stack.blocks, root.stack.gain = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.Parameter(torch.ones(1))
    assert anchors(root) == {"scale": "outside units", "stack.gain": "outside units"}


@pytest.mark.parametrize("kind", [nn.ParameterList, lambda p: nn.ParameterDict({"0": p[0]})], ids=["list", "dict"])
def test_a_parameter_container_outside_a_unit_is_no_unit(kind):
    root = model()
    root.loose = kind([nn.Parameter(torch.ones(3))])
    assert anchors(root) == {"loose.0": "outside units"}


def test_a_parameter_container_inside_a_unit_streams():
    root = model()
    root.adapted = nn.ModuleList(nn.Module() for _ in range(2))
    for block in root.adapted:
        block.factors, block.layer = nn.ParameterList([torch.ones(3, 3)]), nn.Linear(3, 3)
    assert anchors(root) == {}


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
def test_a_scripted_module_is_never_a_unit_nor_streams_inside_one():
    root = model()
    root.alone = torch.jit.script(nn.Linear(2, 2))
    root.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.ReLU())) for _ in range(2))
    root.blocks[1][1] = torch.jit.script(nn.Linear(2, 2))
    expected = [f"{owner}.{p}" for owner in ("alone", "blocks.1.1") for p in ("weight", "bias")]
    assert anchors(root) == dict.fromkeys(expected, "scripted")


# ---- what it is


def test_a_lazy_parameter_is_an_anchor():
    root = model()
    root.lazy = nn.LazyLinear(2)
    assert anchors(root) == {"lazy.weight": "lazy", "lazy.bias": "lazy"}


def test_a_meta_parameter_is_an_anchor():
    root = model()
    root.first.weight = nn.Parameter(torch.ones(3, 3, device="meta"))
    assert anchors(root) == {"first.weight": "meta"}


def test_a_tensor_subclass_is_an_anchor():
    class Tagged(torch.Tensor):
        pass

    class TaggedParameter(nn.Parameter):
        pass

    root = model()
    root.first.weight = nn.Parameter(torch.ones(3, 3).as_subclass(Tagged))
    root.second.weight = TaggedParameter(torch.ones(3, 3))
    assert anchors(root) == {"first.weight": "tensor subclass", "second.weight": "tensor subclass"}


def test_a_parameter_with_a_graph_is_an_anchor():
    root = model()
    root.first.weight.requires_grad_(False).mul_(torch.ones(3, 3, requires_grad=True))
    assert not root.first.weight.is_leaf
    assert anchors(root) == {"first.weight": "not a leaf"}


MEMORY = {
    "step": (torch.ones(3, 6)[:, ::2], False),
    "hole": (torch.ones(3, 4)[:, :3], False),
    "expanded": (torch.ones(1, 3).expand(3, 3), False),
    "overlap": (torch.ones(5).as_strided((3, 3), (1, 1)), False),
    "conjugate": (torch.ones(3, 3, dtype=torch.complex64).conj(), False),
    "transposed": (torch.ones(3, 2).t(), True),
    "channels_last": (torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
    "one_channel": (torch.ones(2, 1, 4, 4).to(memory_format=torch.channels_last), True),
    "offset": (torch.ones(4)[1:], True),
    "scalar": (torch.ones(4)[2], True),
    "odd_stride_of_one": (torch.ones(6).as_strided((2, 1, 3), (3, 99, 1)), True),
    "empty": (torch.ones(0).as_strided((0, 3), (7, 1)), True),
    "bf16": (torch.ones(3, dtype=torch.bfloat16), True),
}


@pytest.mark.parametrize(("tensor", "streams"), MEMORY.values(), ids=MEMORY)
def test_only_dense_memory_streams(tensor, streams):
    parameter = nn.Parameter(tensor)
    assert is_streamable(parameter) is streams
    root = model()
    root.first.weight = parameter
    assert anchors(root) == ({} if streams else {"first.weight": "not dense"})


def test_a_plain_tensor_is_not_streamable():
    assert not is_streamable(torch.ones(3))


# ---- whose memory it is


def test_parameters_that_share_memory_without_being_one_object_are_anchors():
    root = model()
    root.second.weight = nn.Parameter(root.first.weight.data)
    assert anchors(root) == {"first.weight": "shares storage", "second.weight": "shares storage"}


def test_a_parameter_that_shares_memory_with_a_buffer_is_an_anchor():
    root = model()
    root.register_buffer("flat", root.first.weight.data.view(-1)[4:])
    assert anchors(root) == {"first.weight": "shares storage"}


def test_one_large_buffer_over_many_parameters_marks_all_of_them():
    root, flat = model(), torch.ones(40)
    root.first.weight, root.second.weight = (nn.Parameter(flat[i : i + 9].view(3, 3)) for i in (2, 20))
    root.register_buffer("flat", flat)
    assert anchors(root) == {"first.weight": "shares storage", "second.weight": "shares storage"}


def test_neighbours_in_one_storage_stream():
    root, flat = model(), torch.ones(18)
    root.first.weight, root.second.weight = nn.Parameter(flat[:9].view(3, 3)), nn.Parameter(flat[9:].view(3, 3))
    assert anchors(root) == {}


# ---- what streams although it is unusual


def test_empty_parameters_stream_and_share_no_memory():
    root = model()
    root.first.rest, root.second.rest = (nn.Parameter(torch.ones(3, 0)) for _ in range(2))
    assert anchors(root) == {}


def test_frozen_integer_and_boolean_parameters_stream():
    root = model()
    for name, values in (("table", torch.arange(3)), ("mask", torch.ones(3, dtype=torch.bool))):
        root.first.register_parameter(name, nn.Parameter(values, requires_grad=False))
    root.second.requires_grad_(False)
    assert anchors(root) == {}


# ---- refused


def _quantised() -> nn.Parameter:
    with warnings.catch_warnings():  # torch deprecates it once in a process, for whichever test comes first
        warnings.simplefilter("ignore", UserWarning)
        values = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    return nn.Parameter(values, requires_grad=False)


def _named(name: str, module: str) -> nn.Parameter:
    """A parameter of a class as a quantisation package would make it."""
    return type(name, (nn.Parameter,), {"__module__": module})(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(torch.eye(3).to_sparse()), "is sparse.*torch.sparse_coo.*to_dense"),
        (lambda: nn.Parameter(torch.eye(3).to_sparse_csr()), "is sparse.*torch.sparse_csr.*to_dense"),
        *(
            (lambda dtype=dtype: nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False), "is quantised.*float8")
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        ),
        (_quantised, "is quantised.*qint8.*bfloat16"),
        (lambda: _named("Params4bit", "bitsandbytes.nn.modules"), "is quantised.*Params4bit"),
        (lambda: _named("Int8Params", "bitsandbytes.nn.modules"), "is quantised.*Int8Params"),
        (lambda: _named("Float8Tensor", "torchao.quantization"), "is quantised.*Float8Tensor"),
    ],
    ids=["coo", "csr", "e4m3", "e5m2", "qint8", "4bit", "int8", "torchao"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_form_that_cannot_stream_is_refused_by_name(make, message):
    root = model()
    root.second.weight = make()
    with pytest.raises(UnsupportedError, match=f"parameter 'second.weight' {message}"):
        partition(root)
