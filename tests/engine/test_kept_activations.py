"""What a unit does that cannot be done twice is kept, by name, or refused where the user named the unit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_superpipe.engine.activations import Policy
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import ConfigError, SuperpipeWarning, UnsupportedError
from tests.engine.policies import choices, made_of, stream
from tests.engine.tiny import CPU, WIDTH, Block, batches, chain, is_equal, open_engine, train

pytestmark = pytest.mark.usefixtures("everything_travels")
POLICIES = [Policy.RECOMPUTE, Policy.OFFLOAD]


# -- what keeps, by name


class DynamicCache:
    """Stands for the cache of keys and values: an object that a unit changes."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Caches(Block):
    def forward(self, x: Tensor, cache: DynamicCache | None = None) -> Tensor:
        if cache is not None:
            cache.keys.append(x)
            x = x + sum(cache.keys)
        return super().forward(x)


class GivesCache(nn.Module):
    """Passes a cache on, as a decoder does; it is the unit's parent, not a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Caches(dropout=0.1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        cache = DynamicCache()
        for block in self.blocks:
            x = block(x, cache)
        return x


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x.clone())


class Normalises(Block):
    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]


class CountsInBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1.0
        return super().forward(x) + self.count


class CountsInAttribute(Block):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


class DrawsFromPython(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class DrawsFromNumpy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * numpy.random.rand()


class OwnGenerator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(WIDTH, generator=self.generator)


class Hooked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(lambda module, args, output: output + 1)


class Clamps(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


KEPT: list[tuple[Callable[[], nn.Module], str]] = [
    (InPlace, "changes its input in place"),
    (Normalises, "BatchNorm1d updates its statistics"),
    (CountsInBuffer, "changes a buffer"),
    (CountsInAttribute, "sets CountsInAttribute.count"),
    (DrawsFromPython, "generator of Python or NumPy"),
    (DrawsFromNumpy, "generator of Python or NumPy"),
    (OwnGenerator, "draws from a generator of its own"),
    (Hooked, "forward hooks"),
    (Clamps, "changes its weights"),
]


def seeded_elsewhere() -> None:
    random.seed(1)
    numpy.random.seed(1)


@pytest.mark.parametrize(("kind", "reason"), KEPT)
def test_what_cannot_run_again_keeps_and_is_said_once(kind: Callable[[], nn.Module], reason: str) -> None:
    seeded_elsewhere()
    expected = train(made_of(kind), batches(3))
    seeded_elsewhere()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = stream(made_of(kind), Policy.RECOMPUTE, num_batches=3)
    messages = [str(each.message) for each in said if issubclass(each.category, SuperpipeWarning)]
    assert len(messages) == 1
    assert "'blocks.1'" in messages[0]
    assert reason in messages[0]
    assert is_equal(result, expected)


@pytest.mark.parametrize(("kind", "reason"), KEPT)
def test_a_unit_that_was_named_is_refused(kind: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"'blocks\.1' cannot recompute: .*{reason}.*Use 'keep'"):
        stream(made_of(kind), Policy.RECOMPUTE, is_explicit=True)


def test_a_unit_that_is_given_a_cache_keeps() -> None:
    torch.manual_seed(0)
    expected = train(GivesCache(), batches(2))
    torch.manual_seed(0)
    module: Any = GivesCache()
    with pytest.warns(SuperpipeWarning, match=r"'blocks\.0' keeps .* given a DynamicCache, .*use_cache=False"):
        result = stream(module, Policy.RECOMPUTE)
    assert is_equal(result, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_tensor_hooks_of_the_user_decide(policy: Policy) -> None:
    module, packed = chain(3), []
    with open_engine(module, ThreadLanes(CPU, None), choices=choices(policy, 3)) as engine:
        hooks = saved_tensors_hooks(lambda t: (packed.append(1), t)[1], lambda t: t)
        with engine.step("train"), hooks, pytest.warns(SuperpipeWarning, match="hooks of your own"):
            module(batches(1)[0]).sum().backward()
    assert len(packed) > 3


# -- what changed between forward and backward


def change_bias(module: Any) -> None:
    module.blocks[1].up.bias.data.copy_(torch.zeros_like(module.blocks[1].up.bias))
    torch.autograd.graph.increment_version(module.blocks[1].up.bias)


def change_mode(module: Any) -> None:
    module.blocks[1].eval()


@pytest.mark.parametrize(("change", "what"), [(change_bias, "weights"), (change_mode, "attributes")])
def test_a_unit_that_changed_before_backward_is_refused(change: Callable[[Any], None], what: str) -> None:
    module = chain(3, dropout=0.1)
    with open_engine(module, ThreadLanes(CPU, None), choices=choices(Policy.RECOMPUTE, 3)) as engine:
        with engine.step("train"):
            loss = module(batches(1)[0]).pow(2).mean()
        change(module)
        with pytest.raises(UnsupportedError, match=rf"{what} of unit 'blocks\.1' changed between"):
            loss.backward()


def test_backward_after_the_session_is_refused_for_recomputed_units() -> None:
    module = chain(3)
    recomputing = choices(Policy.RECOMPUTE, 3)
    with open_engine(module, ThreadLanes(CPU, None), choices=recomputing) as engine, engine.step("train"):
        loss = module(batches(1)[0]).pow(2).mean()
    with pytest.raises(UnsupportedError, match=r"'blocks\.2' must be recomputed, but"):
        loss.backward()
