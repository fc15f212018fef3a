"""Steps split by units, run as late as can be, leave what the ordinary optimizer leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.host_lane import HostEvent
from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.engine.pending import Pending
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.optimizer import UpdateStage, separable, stage
from tests.engine.tiny import CPU, Chain, batches, chain, open_engine
from tests.optimizer.late_updates import LateStage

NUM_STEPS = 4

StageOf = Callable[[Engine], UpdateStage]


class Loop(NamedTuple):
    """A training loop as people write it, and what it leaves."""

    optimizer: Callable[..., Optimizer]
    clip: float | None = None
    accumulate: int = 1
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    sets_to_none: bool = True
    between: Callable[[nn.Module, Optimizer], Any] = lambda module, optimizer: None

    def run(self, module: nn.Module, optimizer: Optimizer, step: Callable[..., Any], announce: Any = None) -> list[Any]:
        scheduler = self.schedule(optimizer) if self.schedule else None
        seen: list[Any] = []
        for number, x in enumerate(batches(NUM_STEPS * self.accumulate)):
            is_last = number % self.accumulate == self.accumulate - 1
            with step():
                loss = module(x).square().mean()
            if announce is not None and is_last:
                announce(optimizer)
            loss.backward()
            seen.append(loss.item())
            if is_last:
                if self.clip:
                    seen.append(nn.utils.clip_grad_norm_(module.parameters(), self.clip).item())
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                seen.append(self.between(module, optimizer))
                optimizer.zero_grad(set_to_none=self.sets_to_none)
        return seen


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, **options)


def with_groups(parameters: Any) -> Optimizer:
    first, *rest = list(parameters)
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest, "weight_decay": 0.5}], lr=1e-2)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "adamw fused": partial(adamw, fused=True),
    "adamw foreach": partial(adamw, foreach=True),
    "adamw amsgrad": partial(adamw, amsgrad=True, maximize=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "groups": with_groups,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}


def norm(module: nn.Module, _: Optimizer) -> float:
    return sum(parameter.norm().item() for parameter in module.parameters())


def states(_: nn.Module, optimizer: Optimizer) -> float:
    return sum(
        value.float().sum().item()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def weights_of_a_state_dict(module: nn.Module, optimizer: Optimizer) -> float:
    held = [*module.state_dict().values()]
    held += [v for s in optimizer.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
    return sum(value.float().sum().item() for value in held)


def scale_weights(module: nn.Module, _: Optimizer) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.99)


def reload(_: nn.Module, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def zero_the_gradients(module: nn.Module, _: Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad.zero_()  # type: ignore[union-attr]


LOOPS = {name: Loop(make) for name, make in OPTIMIZERS.items()} | {
    "clipped": Loop(adamw, clip=0.05),
    "accumulated": Loop(adamw, accumulate=3),
    "scheduled": Loop(adamw, schedule=partial(StepLR, step_size=1, gamma=0.5)),
    "scheduled tensor": Loop(OPTIMIZERS["adamw tensor lr"], schedule=partial(StepLR, step_size=1, gamma=0.5)),
    "zeroed in place": Loop(adamw, sets_to_none=False),
    "weights read": Loop(adamw, between=norm),
    "states read": Loop(adamw, between=states),
    "saved": Loop(adamw, between=weights_of_a_state_dict),
    "weights written": Loop(adamw, between=scale_weights),
    "state reloaded": Loop(adamw, between=reload),
    "gradients written": Loop(adamw, between=zero_the_gradients),
}


def plainly(loop: Loop) -> tuple[list[Any], Chain, Optimizer]:
    module = chain(4, dropout=0.1)
    optimizer = loop.optimizer(module.parameters())
    torch.manual_seed(2)
    return loop.run(module, optimizer, contextlib.nullcontext), module, optimizer


@contextlib.contextmanager
def streamed(module: nn.Module, lanes: Lanes, stage_of: StageOf) -> Iterator[tuple[Engine, UpdateStage]]:
    with open_engine(module, lanes, k=2) as engine:
        updates = stage_of(engine)
        try:
            yield engine, updates
        finally:
            updates.close()


def streams_to_the_same(
    loop: Loop, *, in_backward: bool = False, stage_of: StageOf = LateStage, max_delay_ms: float = 0.3
) -> bool:
    """Whether the streamed loop leaves the ordinary one's numbers, weights and optimizer state."""
    expected, plain, plain_optimizer = plainly(loop)
    module = chain(4, dropout=0.1)
    optimizer = loop.optimizer(module.parameters())
    torch.manual_seed(2)
    with streamed(module, ThreadLanes(CPU, None, max_delay_ms=max_delay_ms), stage_of) as (engine, updates):
        updates.attend([optimizer])
        announce = partial(updates.announce, lends=True) if in_backward else None
        seen = loop.run(module, optimizer, partial(engine.step, "train"), announce)
        assert updates.num_parts >= 4 * (NUM_STEPS - 1), "nothing was split"
    same = seen == expected and all(map(torch.equal, module.parameters(), plain.parameters()))
    left, right = optimizer.state_dict(), plain_optimizer.state_dict()
    return same and repr(left) == repr(right) and list(left["state"]) == list(right["state"])


@pytest.mark.parametrize("name", LOOPS)
def test_late_updates_leave_what_the_ordinary_optimizer_leaves(name: str) -> None:
    assert streams_to_the_same(LOOPS[name])


# After an update in backward there are no gradients that somebody could clip, or write to.
IN_BACKWARD = [name for name, loop in LOOPS.items() if not loop.clip and loop.between is not zero_the_gradients]


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_updates_in_backward_leave_what_the_ordinary_optimizer_leaves(name: str) -> None:
    assert streams_to_the_same(LOOPS[name], in_backward=True)


# -- each fence, taken away


Patch = pytest.MonkeyPatch


def without_waiting_copies(patch: Patch) -> None:
    """A unit's copy does not wait for its update."""
    h2d = Lanes.h2d

    def unfenced(self: Lanes, copies: Any, *, after: Any, label: Any) -> Any:
        return h2d(self, copies, after=[event for event in after if not isinstance(event, HostEvent)], label=label)

    patch.setattr(Lanes, "h2d", unfenced)


def without_fenced_tensors(patch: Patch) -> None:
    """Tensors under update look like any other."""
    patch.setattr(Pending, "hold", lambda self, tensors: self._tensors.extend([]))


def without_options_of_now(patch: Patch) -> None:
    """A part runs with the hyperparameters of the time when it runs."""
    patch.setattr(stage, "options", lambda optimizer: optimizer.param_groups)
    step = separable.step_of

    def later(optimizer: Optimizer, groups: Any, some: Any, state: Any) -> None:
        step(optimizer, separable.options(optimizer), some, state)

    patch.setattr(separable, "step_of", later)


def without_gradients_of_now(patch: Patch) -> None:
    """A part takes ``p.grad`` when it runs."""

    def later(optimizer: Optimizer, groups: Any, some: Any) -> Callable[[], None]:
        return lambda: separable.step_of(
            optimizer, groups, [member for member in some if member.parameter.grad is not None], optimizer.state
        )

    patch.setattr(stage, "narrowed", later)


@pytest.mark.parametrize(
    ("remove", "name"),
    [
        (without_waiting_copies, "adamw"),
        (without_fenced_tensors, "weights read"),
        (without_fenced_tensors, "weights written"),
        (without_fenced_tensors, "states read"),
        (without_fenced_tensors, "gradients written"),
        (without_options_of_now, "scheduled"),
        (without_gradients_of_now, "adamw"),
    ],
)
def test_numbers_are_wrong_without(remove: Callable[[Patch], None], name: str, monkeypatch: Patch) -> None:
    assert streams_to_the_same(LOOPS[name])
    remove(monkeypatch)
    with contextlib.suppress(RuntimeError):  # or it is noticed
        assert not streams_to_the_same(LOOPS[name])


def test_numbers_are_wrong_where_updates_in_backward_do_not_wait_for_gradients(monkeypatch: Patch) -> None:
    start = UpdateStage._start

    def at_once(self: Any, unit: Any, part: Any, bench: Any, *, after: Any, rank: int) -> None:
        start(self, unit, part, bench, after=stage.Past(), rank=rank)

    monkeypatch.setattr(UpdateStage, "_start", at_once)
    with contextlib.suppress(SuperpipeError):  # or it is noticed
        assert not streams_to_the_same(LOOPS["accumulated"], in_backward=True, stage_of=UpdateStage, max_delay_ms=10.0)
