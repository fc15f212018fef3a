"""The class swap: invisible to isinstance, copies, pickles and files, and undone without a trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.swap import owner_of, swap_in, swap_out
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from tests.engine.tiny import CPU, WIDTH, Block, Chain, batches, chain, open_engine


class Owner:
    """Counts calls and lets them through."""

    device = torch.device("meta")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.num_calls = module, 0

    def owns(self, module: nn.Module) -> bool:
        return module is self.module

    def call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.num_calls += 1
        return forward(*args, **kwargs)

    def host_state(self, module: nn.Module) -> dict[str, Any]:
        return {"_parameters": {name: nn.Parameter(torch.zeros(1)) for name in module._parameters}}


def swapped() -> tuple[nn.Linear, Owner]:
    module = nn.Linear(2, 2)
    owner = Owner(module)
    swap_in(module, owner)
    return module, owner


# -- identity


def test_class_is_a_subclass_with_the_same_name_while_swapped() -> None:
    module, owner = swapped()
    kind = type(module)
    assert isinstance(module, nn.Linear)
    assert kind is not nn.Linear
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Linear", "Linear", nn.Linear.__module__)
    assert repr(module) == repr(nn.Linear(2, 2))
    assert owner_of(module) is owner
    swap_out(module)
    assert type(module) is nn.Linear
    assert set(module.__dict__) == set(nn.Linear(2, 2).__dict__)
    assert owner_of(module) is None


def test_one_class_per_class() -> None:
    assert type(swapped()[0]) is type(swapped()[0])


def test_swapping_twice_changes_the_owner_only() -> None:
    module, _ = swapped()
    kind, second = type(module), Owner(module)
    swap_in(module, second)
    assert type(module) is kind
    assert owner_of(module) is second
    swap_out(module)
    swap_out(module)
    assert type(module) is nn.Linear


def test_calls_go_through_the_owner_with_everything_they_were_given() -> None:
    seen: list[tuple[Any, Any]] = []

    class Takes(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return args[0]

    module = Takes()
    owner = Owner(module)
    swap_in(module, owner)
    argument: list[int] = []
    assert module(argument, 1, key=None) is argument
    assert seen == [((argument, 1), {"key": None})]
    assert owner.num_calls == 1


def test_own_call_of_a_class_still_runs() -> None:
    class OwnCall(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return cast(Tensor, super().__call__(x)) + 1

    module = OwnCall(2, 2)
    expected = module(torch.ones(2))
    swap_in(module, Owner(module))
    assert torch.equal(module(torch.ones(2)), expected)


def test_class_that_registers_its_subclasses_is_swapped_all_the_same() -> None:
    registry: dict[str, type] = {}

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, key: str) -> None:
            assert key not in registry
            registry[key] = cls

    class Mine(Registered, key="mine"):
        pass

    module = Mine(2, 2)
    swap_in(module, Owner(module))
    assert isinstance(module, Mine)
    assert registry == {"mine": Mine}
    swap_out(module)
    assert type(module) is Mine


def test_device_of_a_module_is_where_it_computes() -> None:
    class Asks(nn.Linear):
        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

    module = Asks(2, 2)
    swap_in(module, Owner(module))
    assert module.device == torch.device("meta")
    swap_out(module)
    assert module.device == CPU


# -- strangers that carry our mark


def test_shallow_copy_is_a_stranger() -> None:
    module, owner = swapped()
    stranger = nn.Linear(2, 2)
    stranger.__dict__.update(module.__dict__)
    assert owner_of(stranger) is None
    stranger.__class__ = type(module)
    assert torch.equal(stranger(torch.ones(2)), module(torch.ones(2)))
    assert owner.num_calls == 1


def test_copy_of_a_module_is_ordinary() -> None:
    module, owner = swapped()
    for made in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(made) is nn.Linear
        assert owner_of(made) is None
        assert made.weight.numel() == 1, "what the owner says is at home"
    assert owner.num_calls == 0


# -- with an engine


def test_everything_is_as_before_after_close() -> None:
    module = chain(3)
    before = [(type(m), set(m.__dict__), list(m._forward_hooks)) for m in module.modules()]
    parameters = list(module.parameters())
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        with engine.step("train"):
            loss = module(batches(1)[0]).sum()
        loss.backward()
        assert type(module.blocks[0]) is not Block
    assert [(type(m), set(m.__dict__), list(m._forward_hooks)) for m in module.modules()] == before
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))


class Copies(Block):
    """Copies itself in every way in the middle of its forward, where twins are bound."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        self.made = []
        self.made = [copy.deepcopy(self), pickle.loads(pickle.dumps(self)), _saved(self)]
        return super().forward(x)


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


def test_copies_made_inside_a_unit_are_ordinary_and_hold_host_weights() -> None:
    torch.manual_seed(0)
    module = Chain(0)
    module.blocks.extend(Copies() for _ in range(3))
    states = [{name: value.clone() for name, value in block.state_dict().items()} for block in module.blocks]
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        with engine.step("train"):
            module(batches(1)[0])
        for block, state in zip(module.blocks, states, strict=True):
            for made in cast(Copies, block).made:
                assert type(made) is Copies
                assert all(type(child) is not type(block) for child in made.modules())
                assert {type(child) for child in made.children()} == {nn.LayerNorm, nn.Linear, nn.Dropout}
                assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
                assert all(engine.slots.of(parameter) is None for parameter in made.parameters())
                assert made(batches(1)[0]).isfinite().all()


def test_whole_model_is_saved_and_copied_as_an_ordinary_one() -> None:
    module, x = chain(3), batches(1)[0]
    expected = module(x)
    with open_engine(module, ThreadLanes(CPU, None)):
        made = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), _saved(module)]
        for clone in made:
            assert {type(child) for child in clone.modules()} == {type(child) for child in chain(1).modules()}
            assert torch.equal(clone(x), expected)
        with torch.no_grad():
            next(made[0].parameters()).add_(1)
        assert torch.equal(module(x), expected), "a copy shares nothing"


def test_streamed_and_plain_copies_share_their_memo() -> None:
    module = chain(2)
    pair = [module.blocks[0], cast(Block, module.blocks[0]).up]
    with open_engine(module, ThreadLanes(CPU, None)):
        block, up = copy.deepcopy(pair)
    assert cast(Block, block).up is up


def train_a_step(module: nn.Module, engine: Engine | None) -> list[Tensor]:
    module.zero_grad()
    if engine is None:
        loss = module(batches(1)[0]).pow(2).mean()
    else:
        with engine.step("train"):
            loss = module(batches(1)[0]).pow(2).mean()
    loss.backward()
    return [cast(Tensor, parameter.grad).clone() for parameter in module.parameters()]


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def apply_parametrization(module: Chain) -> None:
    parametrize.register_parametrization(cast(Block, module.blocks[1]).up, "weight", Half())


def apply_weight_norm(module: Chain) -> None:
    torch.nn.utils.parametrizations.weight_norm(cast(Block, module.blocks[1]).up)


def apply_pruning(module: Chain) -> None:
    prune.l1_unstructured(cast(Block, module.blocks[1]).up, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def apply_and_remove(module: Chain) -> None:
    apply_parametrization(module)
    up = cast(Block, module.blocks[1]).up
    parametrize.remove_parametrizations(up, "weight")


CHANGES = [apply_parametrization, apply_weight_norm, apply_pruning, apply_and_remove]


@pytest.mark.parametrize("change", CHANGES)
def test_units_may_be_parametrised_while_they_stream(change: Any) -> None:
    plain = chain(3)
    change(plain)
    expected = train_a_step(plain, None)
    module = chain(3)
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        train_a_step(module, engine)
        change(module)
        assert all(map(torch.equal, train_a_step(module, engine), expected))
    assert [len(type(m).__mro__) for m in module.modules()] == [len(type(m).__mro__) for m in plain.modules()]
    assert all(map(torch.equal, train_a_step(module, None), expected)), "and after we have gone"


def test_parametrization_made_while_streaming_can_be_taken_off_afterwards() -> None:
    module = chain(3)
    with open_engine(module, ThreadLanes(CPU, None)):
        apply_parametrization(module)
    up = cast(Block, module.blocks[1]).up
    parametrize.remove_parametrizations(up, "weight")
    assert type(up) is nn.Linear


@pytest.mark.parametrize("is_used_before", [True, False])
def test_dtype_may_be_changed_while_streaming(is_used_before: bool) -> None:
    module, x = chain(2), batches(1)[0]
    with open_engine(module, ThreadLanes(CPU, None)) as engine:
        if is_used_before:
            module(x)
        module.to(torch.float64)
        with engine.step("train"):
            y = module(x.double())
        assert torch.equal(y, chain(2).double()(x.double()))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


def test_module_called_outside_any_step_computes_with_its_weights_of_now() -> None:
    module, x = chain(3), batches(1)[0]
    with open_engine(module, ThreadLanes(CPU, None)):
        module(x)
        for parameter in module.parameters():
            parameter.data.mul_(0.5)
        assert torch.equal(module(x), copy.deepcopy(module)(x))
        assert torch.equal(module.blocks[2](x), copy.deepcopy(module).blocks[2](x))
        assert module.blocks[0](torch.zeros(1, WIDTH)).isfinite().all()
