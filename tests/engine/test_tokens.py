"""What autograd keeps of a streamed weight: tokens, checked when they are opened."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from tests.engine.tiny import CPU, WIDTH, Block, Chain, batches, chain, engine_of, open_engine


class Attention(nn.Module):
    """One head written with einsum, matmul and sliced weights, (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key = x @ self.qkv[0], F.linear(x, self.qkv[1].t())
        value = torch.einsum("nd,de->ne", x, self.qkv.select(0, 2))
        return x + (query @ key.t()).softmax(-1) @ value @ self.out.transpose(0, 1)


class Convolution(nn.Module):
    """A convolution and a norm, (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.Conv1d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.mix(F.silu(self.norm(self.conv(x[:, None])))))[:, 0]


class Adapted(nn.Module):
    """A frozen layer with a trained one of low rank beside it, (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.frozen(x) + self.up(self.down(x))).tanh()


def stack(kind: Callable[[], nn.Module]) -> Chain:
    torch.manual_seed(0)
    module = Chain(0)
    module.blocks.extend(kind() for _ in range(4))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def weight_bytes_saved(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of tensors whose numbers are those of a weight, whatever dtype or view."""
    weights = [torch.clone(p) for p in module.state_dict().values()]
    pieces = [*weights, *(row for weight in weights if weight.dim() > 2 for row in weight)]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach().clone())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.nbytes for tensor in saved if any(_same(tensor, weight) for weight in pieces))


def _same(tensor: Tensor, weight: Tensor) -> bool:
    if not tensor.numel() == weight.numel() > 1:
        return False
    numbers, expected = (values.float().flatten().sort().values for values in (tensor, weight.to(tensor.dtype)))
    return torch.equal(numbers, expected)


@pytest.mark.parametrize(
    ("kind", "autocast"),
    [
        (Block, False),
        (Block, True),
        (Convolution, False),
        (Convolution, True),
        (Attention, False),
        (Attention, True),
        (Adapted, False),
        (Adapted, True),
    ],
)
def test_saved_tensors_keep_no_bytes_of_weights(kind: Callable[[], nn.Module], autocast: bool) -> None:
    module, x = stack(kind), batches(1)[0]
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    def run() -> Tensor:
        with precision:
            return cast(Tensor, module(x)).float().pow(2).mean()

    assert weight_bytes_saved(module, run) > 0, "the ordinary run keeps them"
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        with engine.step("train"):
            first = weight_bytes_saved(module, run)
        with engine.step("train"):
            assert weight_bytes_saved(module, run) == 0
    # That autocast converts parts of a weight is learned from the first step.
    assert (first > 0) is (kind is Attention and autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [Block, Attention, Convolution, Adapted])
def test_gradients_from_tokens_are_exact(kind: Callable[[], nn.Module], autocast: bool) -> None:
    def gradients(module: nn.Module, step: contextlib.AbstractContextManager[object]) -> list[Tensor]:
        module.zero_grad()
        with step, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(batches(1)[0]).float().pow(2).mean()
        backward(loss)
        return [cast(Tensor, parameter.grad) for parameter in module.parameters() if parameter.requires_grad]

    expected = gradients(stack(kind), contextlib.nullcontext())
    module = stack(kind)
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        for _ in range(2):
            assert all(map(torch.equal, gradients(module, engine.step("train")), expected))


# -- a graph and the weights it was made with


@pytest.fixture
def module() -> Chain:
    return chain(4)


@pytest.fixture
def engine(module: Chain) -> Iterator[Engine]:
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        yield engine


def forward(module: nn.Module, engine: Engine) -> Tensor:
    with engine.step("train"):
        return cast(Tensor, module(batches(1)[0])).pow(2).mean()


def backward(loss: Tensor, **options: bool) -> None:
    loss.backward(**options)  # type: ignore[no-untyped-call]


def weight_of(module: Chain, index: int) -> nn.Parameter:
    return cast(nn.Parameter, cast(Block, module.blocks[index]).up.weight)


def test_weight_changed_in_place_before_backward_is_an_error_as_ever(module: Chain, engine: Engine) -> None:
    loss = forward(module, engine)
    with torch.no_grad():
        weight_of(module, 1).add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*'blocks\.1'"):
        backward(loss)


def test_parameter_replaced_before_backward_is_an_error(module: Chain, engine: Engine) -> None:
    loss = forward(module, engine)
    block = cast(Block, module.blocks[1])
    block.up.weight = nn.Parameter(block.up.weight.detach().clone())
    with engine.step("train"):
        pass
    with pytest.raises(RuntimeError, match=r"'blocks\.1' was replaced"):
        backward(loss)


def gradients_after_an_error(module: Chain, engine: Engine, *, is_in_step: bool) -> list[Tensor]:
    """Let a backward pass raise half-way; return the gradients of the next one."""
    with contextlib.ExitStack() as scopes:
        if is_in_step:
            scopes.enter_context(engine.step("train"))
            loss = module(batches(1)[0]).pow(2).mean()
        else:
            loss = forward(module, engine)
        with torch.no_grad():
            weight_of(module, 1).add_(0.0)
        with pytest.raises(RuntimeError, match="inplace"):
            backward(loss)
        assert all(engine.catalog.unit_of_host(parameter) for parameter in module.parameters())
        module.zero_grad()
    backward(forward(module, engine))
    return [cast(Tensor, parameter.grad) for parameter in module.parameters()]


@pytest.mark.parametrize("is_in_step", [True, False], ids=["in a step", "after a step"])
def test_model_is_in_order_after_a_backward_pass_that_raised(module: Chain, engine: Engine, is_in_step: bool) -> None:
    plain = chain(4)
    plain(batches(1)[0]).pow(2).mean().backward()
    streamed = gradients_after_an_error(module, engine, is_in_step=is_in_step)
    assert all(torch.equal(grad, cast(Tensor, p.grad)) for grad, p in zip(streamed, plain.parameters(), strict=True))


def test_unversioned_update_before_backward_counts_as_it_does_without_us() -> None:
    def gradient(module: Chain, step: contextlib.AbstractContextManager[object]) -> Tensor:
        with step:
            loss = module(batches(1)[0]).pow(2).mean()
        weight_of(module, 1).data.mul_(0.5)
        backward(loss)
        return cast(Tensor, weight_of(module, 0).grad)

    expected, module = gradient(chain(4), contextlib.nullcontext()), chain(4)
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        assert torch.equal(gradient(module, engine.step("train")), expected)


def test_graph_may_be_walked_again_and_again(module: Chain, engine: Engine) -> None:
    loss = forward(module, engine)
    results = []
    for _ in range(3):
        module.zero_grad()
        backward(loss, retain_graph=True)
        results.append(cast(Tensor, weight_of(module, 0).grad).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_two_graphs_may_be_alive_and_walked_in_any_order(module: Chain, engine: Engine) -> None:
    plain = chain(4)
    inputs = batches(2)
    with engine.step("train"):
        losses = [module(x).pow(2).mean() for x in inputs]
    expected = [plain(x).pow(2).mean() for x in inputs]
    for loss in (*losses, *expected):
        backward(loss)
    for streamed, ordinary in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(cast(Tensor, streamed.grad), cast(Tensor, ordinary.grad))


def test_backward_after_the_engine_has_closed_uses_host_weights(module: Chain) -> None:
    plain = chain(4)
    plain(batches(1)[0]).pow(2).mean().backward()
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        loss = forward(module, engine)
    backward(loss)
    for streamed, ordinary in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(cast(Tensor, streamed.grad), cast(Tensor, ordinary.grad))


def test_graph_holds_neither_the_engine_nor_its_slots(module: Chain) -> None:
    engine = engine_of(module, ThreadLanes(CPU, None))
    loss = forward(module, engine)
    kept: list[Any] = [weakref.ref(engine), weakref.ref(engine.slots), *map(weakref.ref, engine.units)]
    engine.close()
    del engine
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    backward(loss)


# -- the pair of hooks below


def test_pair_below_gets_everything_but_weights(module: Chain, engine: Engine) -> None:
    packed: list[Any] = []
    unpacked: list[Any] = []

    def pack(tensor: Tensor) -> tuple[str, Tensor]:
        packed.append(tensor)
        return ("packed", tensor)

    def unpack(value: tuple[str, Tensor]) -> Tensor:
        assert value[0] == "packed"
        unpacked.append(value[1])
        return value[1]

    with saved_tensors_hooks(pack, unpack):
        loss = forward(module, engine)
    assert packed
    assert all(engine.slots.of(tensor) is None for tensor in packed)
    backward(loss)
    assert len(unpacked) == len(packed)


def test_hooks_of_a_step_are_gone_after_it(module: Chain, engine: Engine) -> None:
    forward(module, engine)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
