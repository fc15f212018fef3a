"""Loads per step: as the formulas say, for every window; and no plan misses where a model does the same each step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_superpipe.config import Adversary, SuperpipeConfig
from lightning_superpipe.planning.cost import loads_forward, loads_training, loads_unchanged
from lightning_superpipe.session import Session
from tests.engine.tiny import CPU, WIDTH, Chain, batches, is_equal, train

X = batches(1)[0]


class Traffic(NamedTuple):
    """What one step cost."""

    num_loads: int
    num_misses: int


class Loop:
    """A plain training loop around a session."""

    def __init__(self, module: nn.Module, k: int, k_prime: int = 1) -> None:
        self.module = module
        config = SuperpipeConfig(k=k, k_prime=min(k, k_prime), adversary=Adversary())
        self.session = Session(module, config, CPU, trains=True, owns_root=True)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[list[Traffic]]:
        before, counted = self.session.report().total, cast(list[Traffic], [])
        yield counted
        spent = self.session.report().total - before
        counted.append(Traffic(spent.num_loads, spent.num_plan_misses))

    def train(self, *, updates: bool = True, is_undisturbed: bool = False) -> Traffic:
        """Run forward, backward and, perhaps, an update."""
        with self._counted() as counted:
            with self.session.step("train", is_undisturbed=is_undisturbed):
                loss = self.module(X).pow(2).mean()
            loss.backward()
            if updates:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return counted[0]

    def evaluate(self, *, is_undisturbed: bool = True) -> Traffic:
        """Run one forward without gradients."""
        with self._counted() as counted, self.session.step("validate", is_undisturbed=is_undisturbed), torch.no_grad():
            self.module(X)
        return counted[0]

    def last_of(self, num_steps: int, step: Callable[..., Traffic], **options: bool) -> Traffic:
        """Run some steps and return the cost of the last."""
        return [step(**options) for _ in range(num_steps)][-1]


@contextlib.contextmanager
def loop_over(module: nn.Module, k: int, k_prime: int = 1) -> Iterator[Loop]:
    loop = Loop(module, k, k_prime)
    try:
        yield loop
    finally:
        loop.session.close()


def windows(num_units: int) -> list[tuple[int, int]]:
    """Return all k up to one more than the units, each with some k_prime; with all of them where units are few."""
    return [
        (k, k_prime)
        for k in range(1, num_units + 2)
        for k_prime in (range(1, k + 1) if num_units < 5 else sorted({min(2, k), 1 + num_units % k}))
    ]


# -- the formulas


def matrices(num_units: int) -> nn.Sequential:
    """Return the cheapest chain there is."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(num_units)])


@pytest.mark.parametrize("num_units", range(2, 9))
def test_training_loads_each_unit_twice_but_for_those_of_the_turn(num_units: int) -> None:
    for k, k_prime in windows(num_units):
        with loop_over(matrices(num_units), k, k_prime) as loop:
            cost = loop.last_of(2, loop.train)
        assert cost == (loads_training(num_units, k), 0), f"k={k}, k'={k_prime}"


@pytest.mark.parametrize("num_units", range(2, 9))
def test_undisturbed_training_with_updates_loads_as_much(num_units: int) -> None:
    for k, k_prime in windows(num_units):
        with loop_over(matrices(num_units), k, k_prime) as loop:
            cost = loop.last_of(2, loop.train, is_undisturbed=True)
        assert cost == (loads_training(num_units, k), 0), f"k={k}, k'={k_prime}"


@pytest.mark.parametrize("num_units", range(2, 9))
def test_accumulating_keeps_what_the_last_backward_left(num_units: int) -> None:
    for k, k_prime in windows(num_units):
        with loop_over(matrices(num_units), k, k_prime) as loop:
            cost = loop.last_of(3, loop.train, updates=False, is_undisturbed=True)
            assert cost == (loads_unchanged(num_units, k), 0), f"k={k}, k'={k_prime}"
            cost = loop.train(updates=False, is_undisturbed=False)
            assert cost == (loads_training(num_units, k), 0), "user code may have written to weights"


@pytest.mark.parametrize("num_units", range(2, 9))
def test_repeated_evaluation_keeps_units_for_good(num_units: int) -> None:
    num_passes = 6
    for k, k_prime in windows(num_units):
        k_prime = min(k_prime, num_units)
        with loop_over(matrices(num_units), k, k_prime) as loop:
            loop.last_of(2, loop.evaluate)
            costs = [loop.evaluate() for _ in range(num_passes)]
        expected = loads_forward(num_units, min(k, num_units), min(k_prime, k, num_units))
        total = sum(cost.num_loads for cost in costs)
        if k_prime == 1:
            assert {cost.num_loads for cost in costs} == {expected}, f"k={k}"
        else:  # transfers may straddle two passes: the formula is their mean, rounded up
            assert -num_passes < total - num_passes * expected <= k_prime, f"k={k}, k'={k_prime}"
        assert all(cost.num_misses == 0 for cost in costs)


@pytest.mark.parametrize("num_units", [3, 6])
def test_disturbed_evaluation_loads_everything(num_units: int) -> None:
    for k, k_prime in windows(num_units):
        with loop_over(matrices(num_units), k, k_prime) as loop:
            cost = loop.last_of(3, loop.evaluate, is_undisturbed=False)
        assert cost == (num_units, 0), f"k={k}, k'={k_prime}"


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_evaluation_between_training_steps_misses_nothing(k: int) -> None:
    with loop_over(matrices(5), k) as loop:
        for _ in range(2):
            costs = [loop.train(), loop.evaluate(is_undisturbed=False), loop.train()]
    assert costs == [(10 - k, 0), (5, 0), (10 - k, 0)]


# -- models that do the same each step, though not in the order of registration


class Backwards(Chain):
    """Runs its blocks from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Loops(Chain):
    """Runs all its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Repeats(Chain):
    """Runs one of its blocks three times in a row."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            for _ in range(3 if index == 1 else 1):
                x = block(x)
        return x


class Skips(Chain):
    """Adds early outputs to late inputs, as a U-Net does, and leaves its third block out."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index != 2:
                x = block(x + outputs[2 - index] if index > 3 else x)
                outputs.append(x)
        return x


class HalfFrozen(Chain):
    """Trains its later blocks only."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        for block in list(self.blocks)[:3]:
            block.requires_grad_(False)


class Checkpointed(Chain):
    """Recomputes each block in backward."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        for block in self.blocks:
            x = cast(Tensor, checkpoint(block, x, use_reentrant=self.use_reentrant))
        return x


class CheckpointedReentrant(Checkpointed):
    """The same with the older kind of checkpoint."""

    use_reentrant = True


class Spans(Chain):
    """Recomputes spans of two blocks in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for first in range(0, len(self.blocks), 2):
            span = nn.Sequential(*list(self.blocks)[first : first + 2])
            x = cast(Tensor, checkpoint(span, x, use_reentrant=False))
        return x


STATIC = [Backwards, Loops, Repeats, Skips, HalfFrozen, Checkpointed, CheckpointedReentrant, Spans]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", STATIC)
def test_static_model_misses_nothing_from_its_second_step_on(kind: type[Chain], k: int) -> None:
    torch.manual_seed(0)
    with loop_over(kind(6), k) as loop:
        loop.train()
        costs = [loop.train() for _ in range(3)]
    assert {cost.num_misses for cost in costs} == {0}
    assert len({cost.num_loads for cost in costs}) == 1


@pytest.mark.parametrize("k", [1, 2, 6])
def test_frozen_units_are_not_loaded_for_backward(k: int) -> None:
    torch.manual_seed(0)
    with loop_over(HalfFrozen(6), k) as loop:
        cost = loop.last_of(3, loop.train)
    # Forward loads all six; backward ends at the fourth, and finds the last k there.
    assert cost.num_loads == 6 + max(0, 3 - k)


# -- models that do something else each step


class Branches(Chain):
    """Runs some of its blocks, in an order of its own each time."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, dropout=0.1)
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.rng.sample(range(len(self.blocks)), self.rng.randint(1, len(self.blocks)))
        for index in chosen:
            x = self.blocks[index](x)
        return x


class Routes(Chain):
    """Takes one of two blocks at each level, by the sign of the data."""

    def forward(self, x: Tensor) -> Tensor:
        for level in range(0, len(self.blocks) - 1, 2):
            x = self.blocks[level + int(x.sum().item() > 0)](x) * -1.1
        return x


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (3, 2), (6, 1)])
@pytest.mark.parametrize("kind", [Branches, Routes])
def test_data_dependent_model_is_exact_and_its_misses_are_counted(kind: type[Chain], k: int, k_prime: int) -> None:
    def model() -> Chain:
        torch.manual_seed(0)
        return kind(6)

    inputs = batches(8)
    expected = train(model(), inputs)
    module = model()
    adversary = Adversary(max_delay_ms=0.2)
    session = Session(
        module, SuperpipeConfig(k=k, k_prime=k_prime, adversary=adversary), CPU, trains=True, owns_root=True
    )
    result = train(module, inputs, lambda: session.step("train"))
    session.close()
    assert is_equal(result, expected)
    if kind is Branches and k < 6:
        assert session.report().num_plan_misses > 0


def test_step_that_turns_the_order_round_misses(k: int = 2) -> None:
    module: Any = Branches(6)
    module.rng.sample = lambda population, size: list(population)
    module.rng.randint = lambda least, most: most
    with loop_over(module, k) as loop:
        assert loop.last_of(3, loop.train).num_misses == 0
        module.rng.sample = lambda population, size: list(reversed(population))
        assert loop.train().num_misses > 0, "nothing of what the step needs first had been prefetched"


def test_first_step_of_an_order_that_was_seen_before_is_planned() -> None:
    torch.manual_seed(0)
    with loop_over(Backwards(6), 2) as loop:
        loop.train()
        assert loop.train() == (10, 0)
        loop.evaluate(is_undisturbed=False)
        assert loop.train() == (10, 0)
