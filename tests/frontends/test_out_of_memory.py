"""A device without room, in loops whose steps are their own: one error, and all as it was before the step."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_superpipe import Adversary, FabricSuperpipeStrategy, SuperpipeAccelerator, attach
from lightning_superpipe.engine import backward_passes
from lightning_superpipe.errors import BudgetError
from lightning_superpipe.planning.budget import AUTO_K
from tests.emu import capacity, peak_bytes, reset_peak, used_bytes
from tests.engine.tiny import Block

pytestmark = pytest.mark.filterwarnings("ignore::lightning_superpipe.errors.SuperpipeWarning")
WIDTH, NUM_BLOCKS, NUM_STEPS, FAILS_AT = 16, 5, 5, 2
OPTIONS: Any = {"adversary": Adversary(max_delay_ms=0.5)}


class Network(nn.Module):
    """Batch norm, then blocks with dropout; runs out of memory once, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(Block(WIDTH), nn.Dropout(0.2)) for _ in range(NUM_BLOCKS))
        self.fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for index, block in enumerate(self.blocks):
            if index == 3 and self.fails_in == "forward":
                self.fail()
            if index == 3 and self.fails_in == "backward":
                x.register_hook(self.fail)  # type: ignore[no-untyped-call]
            x = block(x)
        return x

    def fail(self, *_: object) -> None:
        """Once."""
        self.fails_in = ""
        raise torch.OutOfMemoryError("the device has 17 bytes left.")


class Loop(NamedTuple):
    """A model and an optimizer as some front end prepared them."""

    model: Any
    optimizer: Any
    backward: Callable[[Tensor], Any]


@contextmanager
def ordinary(net: Network) -> Iterator[Loop]:
    yield Loop(net, torch.optim.AdamW(net.parameters(), lr=1e-2), Tensor.backward)


@contextmanager
def plain(net: Network, **options: Any) -> Iterator[Loop]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pipe = attach(net, optimizer, device="cpu", **{**OPTIONS, **options})
    yield Loop(net, optimizer, Tensor.backward)
    pipe.close()


@contextmanager
def fabric(net: Network, **options: Any) -> Iterator[Loop]:
    strategy = FabricSuperpipeStrategy(**{**OPTIONS, **options})
    launched = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    model, optimizer = launched.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    yield Loop(model, optimizer, launched.backward)
    strategy.teardown()


@contextmanager
def accelerate(net: Network, **options: Any) -> Iterator[Loop]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = SuperpipeAccelerator(superpipe={**OPTIONS, **options}, cpu=True)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    yield Loop(model, optimizer, accelerator.backward)
    accelerator.free_memory()


def step(loop: Loop, inputs: list[Tensor]) -> None:
    for x in inputs:
        loop.backward(loop.model(x).pow(2).mean())
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def batches(num_micro_batches: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(8, WIDTH, generator=generator) for _ in range(num_micro_batches)] for _ in range(NUM_STEPS)]


def state_of(net: Network, loop: Loop) -> Any:
    states = copy.deepcopy(loop.optimizer.state_dict()["state"])
    tensors = [value for state in states.values() for value in state.values()]
    return [*(value.clone() for value in net.state_dict().values()), *tensors, torch.get_rng_state()]


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture(scope="module")
def expected() -> dict[int, list[Tensor]]:
    """What the ordinary runs end with, by the number of batches in a step."""
    found = {}
    for num_micro_batches in (1, 2):
        net = Network()
        with ordinary(net) as loop:
            for inputs in batches(num_micro_batches):
                step(loop, inputs)
            found[num_micro_batches] = state_of(net, loop)
    return found


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("front", [plain, fabric, accelerate])
def test_step_ends_in_one_error_and_can_be_run_again(
    expected: dict[int, list[Tensor]], front: Any, num_micro_batches: int, fails_in: str
) -> None:
    """The last batch of a step fails: gradients of the one before it are there."""
    net = Network()
    with front(net) as loop:
        for number, inputs in enumerate(batches(num_micro_batches)):
            before = state_of(net, loop)
            if number == FAILS_AT:
                k = AUTO_K if num_micro_batches == 1 else 2  # five forwards have run, and a plan was chosen
                for x in inputs[:-1]:
                    loop.backward(loop.model(x).pow(2).mean())
                net.fails_in = fails_in
                with pytest.raises(BudgetError) as caught:
                    loop.backward(loop.model(inputs[-1]).pow(2).mean())
                assert isinstance(caught.value, torch.OutOfMemoryError)
                for part in (
                    f"k={k}, 0 resident",
                    f"the {fails_in} of unit 'blocks.",
                    "17 bytes left",
                    "The plan is now k=",
                    "again",
                ):
                    assert part in str(caught.value), part
                assert are_equal(state_of(net, loop), before)
                assert all(parameter.grad is None for parameter in net.parameters())
            step(loop, inputs)
        assert are_equal(state_of(net, loop), expected[num_micro_batches])


def test_without_a_smaller_plan_the_error_names_the_other_ways_out() -> None:
    net = Network()
    with plain(net, k=2, activations="keep") as loop:
        step(loop, batches(1)[0])
        net.fails_in = "backward"
        with pytest.raises(BudgetError, match=r"k=2, 0 resident.*has not happened.*smaller batch.*'auto'"):
            step(loop, batches(1)[1])


def test_a_batch_that_was_skipped_is_not_undone(expected: dict[int, list[Tensor]]) -> None:
    """Its gradients were given up, so the step that fails later is another one."""
    net = Network()
    with plain(net) as loop:
        step(loop, batches(1)[0])
        loop.model(batches(1)[1][0]).pow(2).mean().backward()
        loop.optimizer.zero_grad()
        before = state_of(net, loop)
        net.fails_in = "forward"
        with pytest.raises(BudgetError):
            step(loop, batches(1)[2])
        assert are_equal(state_of(net, loop), before)


def test_evaluation_ends_in_the_same_error() -> None:
    net = Network().eval()
    with plain(net) as loop, torch.no_grad():
        wanted = loop.model(batches(1)[0][0])
        net.fails_in = "forward"
        with pytest.raises(BudgetError, match=r"no room for a pass with k=.*the forward of unit") as caught:
            loop.model(batches(1)[0][0])
        assert isinstance(caught.value, torch.OutOfMemoryError)
        assert torch.equal(loop.model(batches(1)[0][0]), wanted)


def test_an_error_of_the_loops_own_is_ours_where_a_with_block_ends() -> None:
    net = Network()
    with pytest.raises(BudgetError, match="no room for a training step"), attach(net, device="cpu"):
        net(batches(1)[0][0])
        raise torch.OutOfMemoryError("no room for the loss.")


def test_torch_is_as_it_was_behind_the_last_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_passes, "_listeners", weakref.WeakSet())  # others' sessions may still be open
    monkeypatch.setattr(torch.autograd, "backward", before := backward_passes._backward)
    one, other = attach(Network(), device="cpu"), attach(Network(), device="cpu")
    assert torch.autograd.backward is not before
    one.close()
    assert torch.autograd.backward is not before
    other.close()
    assert torch.autograd.backward is before


def test_a_session_that_nobody_closes_is_not_kept_alive() -> None:
    ref = weakref.ref(attach(Network(), device="cpu")._session.guard)
    gc.collect()
    assert ref() is None


def test_backward_of_another_model_is_nobodys() -> None:
    net, foreign = Network(), Network()
    with plain(net) as loop:
        step(loop, batches(1)[0])
        foreign.fails_in = "backward"
        with pytest.raises(torch.OutOfMemoryError) as caught:
            foreign(batches(1)[0][0]).sum().backward()
        assert not isinstance(caught.value, BudgetError)


@pytest.mark.emu
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_kernels_that_find_no_room_end_in_it_as_well(emu: torch.device, share: float) -> None:
    """A batch too large is undone, wherever it fails; a smaller one trains on as if it had not been."""
    small, large = (torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(2)) for size in (8, 4096))

    def run(size: int | None) -> list[Tensor]:
        net = Network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, device=emu, k=2, activations="keep"):
            loop = Loop(net, optimizer, Tensor.backward)
            torch.manual_seed(3)
            for _ in range(2):
                step(loop, [small.to(emu)])
            if size is not None:
                inputs = large.to(emu)
                with capacity(size), pytest.raises(BudgetError, match="no room for a training step with k=2"):
                    step(loop, [inputs])
                del inputs
            step(loop, [small.to(emu)])
            return [value.clone() for value in net.state_dict().values()]

    wanted = run(None)
    reset_peak()
    base = used_bytes()
    net = Network()
    with attach(net, device=emu, k=2, activations="keep"):
        net(large.to(emu)).pow(2).mean().backward()
    assert are_equal(run(base + int(share * (peak_bytes() - base))), wanted)
