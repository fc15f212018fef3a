"""Gradients that wait for their optimizer: clipping reads and writes none of them, everybody else sees them clipped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import attach
from lightning_superpipe.config import Link
from lightning_superpipe.engine.arrivals import Arrivals, complete, drop, take
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.optimizer.parts import Part
from tests.engine.tiny import batches, chain
from tests.optimizer.test_pending import READS

LINK = Link(h2d_gb_s=0.5, d2h_gb_s=0.5)
BEFORE, FACTOR, AFTER = 1.0, 3.0, 3.0


def waiting(*, times: int = 2) -> nn.Parameter:
    """A parameter whose gradient waits, with a norm from the second time on."""
    parameter = nn.Parameter(torch.zeros(3))
    arrivals = Arrivals()
    arrivals.expect([parameter])
    for _ in range(times):
        parameter.grad = torch.full((3,), BEFORE)
        arrivals.note(parameter)
        nn.utils.get_total_norm([parameter.grad])
        arrivals.end_step()
    return parameter


def clipped() -> Tensor:
    """A gradient whose factor is known but not multiplied in."""
    gradient = waiting().grad
    assert gradient is not None
    gradient.mul_(torch.tensor(FACTOR))
    assert type(gradient) is not Tensor, "still waiting"
    return gradient


@pytest.mark.parametrize("name", [name for name in READS if name not in ("state dict", "module attribute")])
def test_every_kind_of_reading_sees_what_clipping_did(name: str) -> None:
    gradient = clipped()
    seen = READS[name](gradient)  # type: ignore[arg-type]
    assert torch.equal(seen, torch.full((3,), AFTER))
    assert type(gradient) is type(seen) is Tensor


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda g: pickle.loads(pickle.dumps(g)), Tensor.clone])
def test_copies_are_ordinary_tensors(copied: Callable[[Tensor], Tensor]) -> None:
    other = copied(clipped())
    assert type(other) is Tensor and other.eq(AFTER).all()


def test_the_norm_is_known_before_anybody_asks_again() -> None:
    first, second = waiting(times=1).grad, waiting(times=2).grad
    assert type(first) is Tensor, "the first question is answered by looking"
    assert second is not None and type(second) is not Tensor
    assert torch.equal(torch.linalg.vector_norm(second, 2.0), torch.linalg.vector_norm(torch.ones(3), 2.0))


@pytest.mark.parametrize("order", [1.0, float("inf")])
def test_another_order_is_another_norm(order: float) -> None:
    gradient = waiting().grad
    assert gradient is not None
    assert torch.linalg.vector_norm(gradient, order) == torch.linalg.vector_norm(torch.ones(3), order)


def test_a_norm_is_that_of_the_values_of_now() -> None:
    parameter = waiting()
    gradient = parameter.grad
    assert gradient is not None
    gradient.add_(1.0)
    assert torch.linalg.vector_norm(gradient, 2.0) == torch.linalg.vector_norm(torch.full((3,), 2.0), 2.0)


def test_the_norm_of_a_clipped_gradient_is_smaller() -> None:
    gradient = clipped()
    assert torch.linalg.vector_norm(gradient, 2.0) == torch.linalg.vector_norm(torch.full((3,), AFTER), 2.0)


@pytest.mark.parametrize("other", [2, torch.tensor(2), torch.full((3,), 2.0), torch.tensor(2.0, dtype=torch.float64)])
def test_other_products_are_taken_at_once(other: Any) -> None:
    gradient = waiting().grad
    assert gradient is not None
    gradient.mul_(other)
    assert type(gradient) is Tensor and gradient.eq(2.0).all()


def test_the_factor_is_that_of_then() -> None:
    gradient, factor = waiting().grad, torch.tensor(2.0)
    assert gradient is not None
    gradient.mul_(factor)
    factor.zero_()
    complete(gradient)
    assert gradient.eq(2.0).all()


def test_who_takes_a_gradient_multiplies() -> None:
    gradient = clipped()
    (scaling,) = take([gradient, None])
    drop(gradient)
    assert gradient.eq(BEFORE).all(), "until it is done"
    scaling.run()
    assert gradient.eq(AFTER).all() and not take([gradient])


def test_a_write_that_nobody_announces_is_refused() -> None:
    gradient = clipped()
    with torch._C.DisableTorchFunctionSubclass():
        gradient.add_(1.0)
    with pytest.raises(SuperpipeError, match="gradient of 3 elements was written to between clipping"):
        complete(gradient)


def test_memory_used_again_is_an_ordinary_gradient() -> None:
    gradient = clipped()
    drop(gradient)
    assert type(gradient) is Tensor and gradient.eq(BEFORE).all() and not take([gradient])


def test_nothing_waits_where_nobody_clips() -> None:
    parameter, arrivals = nn.Parameter(torch.zeros(3)), Arrivals()
    arrivals.expect([parameter])
    waited = []
    for _ in range(5):
        parameter.grad = torch.ones(3)
        arrivals.note(parameter)
        waited.append(type(parameter.grad) is not Tensor)
        arrivals.end_step()
    assert waited == [True, True, True, False, False]


def test_gradients_are_ordinary_behind_a_session() -> None:
    module = chain(4)
    optimizer = torch.optim.AdamW(module.parameters())
    with attach(module, optimizer, device="cpu", k=2, link=LINK):
        module(batches(1)[0]).sum().backward()
        assert any(type(parameter.grad) is not Tensor for parameter in module.parameters())
    assert all(type(parameter.grad) is Tensor for parameter in module.parameters())


def run(module: nn.Module, *, stream: bool, clip: Callable[[nn.Module], Any], accumulate: int = 1) -> list[Any]:
    """Train, and return losses, norms and weights."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    seen: list[Any] = []

    def loop() -> None:
        for number, x in enumerate(batches(6 * accumulate)):
            loss = module(x).square().mean()
            loss.backward()
            seen.append(loss.item())
            if number % accumulate == accumulate - 1:
                seen.append(clip(module))
                optimizer.step()
                optimizer.zero_grad()

    if stream:
        with attach(module, optimizer, device="cpu", k=2, link=LINK) as pipe:
            loop()
            seen.append(pipe._session._engine.gradients.arrivals.num_norms)
    else:
        loop()
    return [*seen[: 7 * accumulate], *(parameter.detach().clone() for parameter in module.parameters()), seen[-1]]


def norm(module: nn.Module, **options: Any) -> float:
    return nn.utils.clip_grad_norm_(module.parameters(), 1e-3, **options).item()


def looking(module: nn.Module) -> list[float]:
    """Clip, and look at some gradients."""
    total = norm(module)
    return [total, *(p.grad.sum().item() for p in list(module.parameters())[::3] if p.grad is not None)]


CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "active": norm,
    "idle": lambda module: nn.utils.clip_grad_norm_(module.parameters(), 1e6).item(),
    "largest": lambda module: norm(module, norm_type=float("inf")),
    "foreach": lambda module: norm(module, foreach=True),
    "twice": lambda module: [norm(module), norm(module)],
    "looking": looking,
    "some": lambda module: nn.utils.clip_grad_norm_(list(module.parameters())[1::2], 1e-3).item(),
    "by value": lambda module: nn.utils.clip_grad_value_(module.parameters(), 1e-4),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipped_training_is_the_ordinary_one(clip: Callable[[nn.Module], Any], accumulate: int) -> None:
    module = chain(4)
    expected = run(copy.deepcopy(module), stream=False, clip=clip, accumulate=accumulate)
    streamed = run(module, stream=True, clip=clip, accumulate=accumulate)
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected[:-1], streamed[:-1], strict=True)
    )


def test_clipping_looks_at_no_gradient_after_its_first_step() -> None:
    num_norms = run(chain(4), stream=True, clip=norm)[-1]
    assert num_norms == 5 * len(list(chain(4).parameters()))


def test_parts_multiply_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(chain(4), stream=False, clip=norm)
    monkeypatch.setattr(Part, "scale", lambda part: None)
    streamed = run(chain(4), stream=True, clip=norm)
    weights = [(a, b) for a, b in zip(expected, streamed, strict=True) if isinstance(a, Tensor)]
    assert weights and not all(torch.equal(a, b) for a, b in weights)
