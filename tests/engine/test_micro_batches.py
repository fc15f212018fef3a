"""Micro-batches inside units: equal up to the order of summation, one residency for all parts, refused where unsure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import SuperpipeConfig
from lightning_superpipe.engine.activations import Policy
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.session import Session
from tests.engine.policies import choices, made_of
from tests.engine.tiny import CPU, WIDTH, Block, Chain, Result, chain, is_equal, open_engine, train

NUM_SAMPLES = 12
# Sums of at most twelve terms in another order; gradients here are of size 1e-2 to 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


def inputs(num_batches: int = 1, num_samples: int = NUM_SAMPLES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_samples, WIDTH, generator=generator) for _ in range(num_batches)]


class Pass(NamedTuple):
    """What one forward and backward leaves."""

    output: Tensor
    gradients: list[Tensor]
    num_loads: int


def one_pass(module: nn.Module, x: Tensor, num_parts: int, num_units: int, **window: Any) -> Pass:
    lanes = ThreadLanes(CPU, None, max_delay_ms=0.5)
    picked = choices(Policy.RECOMPUTE, num_units)
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    with open_engine(module, lanes, choices=picked, micro_batches=num_parts, **window) as engine:
        with engine.step("train"):
            output = module(x)
        output.pow(2).mean().backward()
        loads = engine.residency.num_loads
    assert x.grad is not None
    return Pass(output.detach(), [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)], loads)


def plain_pass(module: nn.Module, x: Tensor) -> Pass:
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    output = module(x)
    output.pow(2).mean().backward()
    assert x.grad is not None
    return Pass(output.detach(), [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)], 0)


def assert_close(one: Pass, other: Pass) -> None:
    torch.testing.assert_close([one.output, *one.gradients], [other.output, *other.gradients], **TOLERANCE)


@pytest.mark.parametrize("num_parts", [2, 3, 4, 5, 12, 99])
def test_gradients_equal_the_whole_batch_up_to_summation_order(num_parts: int) -> None:
    (x,) = inputs()
    candidate = one_pass(chain(4), x, num_parts, 4)
    assert_close(candidate, plain_pass(chain(4), x))
    assert candidate.num_loads == 2 * 4 - 2, "parts share one residency"


class Scale(nn.Module):
    """Multiplies each feature: its output sums nothing, (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight)


@pytest.mark.parametrize("num_parts", [2, 5, 12])
def test_what_sums_nothing_over_the_batch_is_equal_bit_for_bit(num_parts: int) -> None:
    def scales() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(Scale() for _ in range(3)))

    (x,) = inputs()
    candidate, expected = one_pass(scales(), x, num_parts, 3), plain_pass(scales(), x)
    assert torch.equal(candidate.output, expected.output)
    assert torch.equal(candidate.gradients[0], expected.gradients[0])


def trained(num_parts: int, seed: int = 0) -> Result:
    module = chain(4, dropout=0.2)
    lanes = ThreadLanes(CPU, None, max_delay_ms=0.5, seed=seed)
    picked = choices(Policy.RECOMPUTE, 4)
    with open_engine(module, lanes, choices=picked, micro_batches=num_parts, seed=seed) as engine:
        return train(module, inputs(3), partial(engine.step, "train"))


def test_a_run_with_dropout_repeats_itself() -> None:
    assert is_equal(trained(4, seed=1), trained(4, seed=2))


class Random(nn.Module):
    """Adds noise where dropout would drop, so that a wrong draw in backward changes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if self.training else torch.ones_like(x)
        Noted.noise.append(noise)
        return x * noise * self.weight


class Noted:
    """What was drawn, in order."""

    noise: ClassVar[list[Tensor]] = []


def test_each_part_draws_in_backward_what_it_drew_in_forward() -> None:
    def noisy() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(Random() for _ in range(2)))

    (x,) = inputs()
    Noted.noise.clear()
    one_pass(noisy(), x, 3, 2)
    rehearsed = [noise for noise in Noted.noise if bool((noise == 1).all())]
    drawn = [noise for noise in Noted.noise if not bool((noise == 1).all())]
    forward, backward = drawn[:6], drawn[6:]
    assert len(rehearsed) == 4, "each unit twice"
    assert len(backward) == 6
    assert len({noise.sum().item() for noise in forward}) == 6
    for noise in backward:
        assert any(torch.equal(noise, other) for other in forward)


class Shapes(Block):
    """Notes the batch sizes that it is given."""

    sizes: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(("num_parts", "sizes"), [(3, [4, 4, 4]), (5, [3, 3, 2, 2, 2]), (99, [1] * 12)])
def test_parts_differ_by_one_sample_at_most(num_parts: int, sizes: list[int]) -> None:
    module = made_of(Shapes)
    Shapes.sizes.clear()
    one_pass(module, inputs()[0], num_parts, 3)
    rehearsal, rest = Shapes.sizes[:2], Shapes.sizes[2:]
    assert rehearsal == [max(2, sizes[0]), max(2, sizes[0]) // 2]
    assert rest == [*sizes, *reversed(sizes)], "backward goes one part after the other"


# -- containers


@dataclass
class Out:
    hidden: Tensor
    extras: list[Any]


class Nested(Block):
    """Takes a mask for all samples and one per sample; returns a container."""

    kind = "tuple"

    def forward(self, x: Tensor, mask: Tensor | None = None, *, given: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        assert mask is not None
        assert given is not None
        y = super().forward(x) * mask * given["weights"][0]
        made = {
            "tuple": (y, (y * 2, None)),
            "list": [y, "constant", mask],
            "dict": OrderedDict(hidden=y, more={"size": WIDTH}),
            "dataclass": Out(y, [y.detach(), 3]),
        }
        return made[self.kind]


def hidden(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["hidden"]  # type: ignore[no-any-return]
    return output.hidden if isinstance(output, Out) else output[0]


class Caller(Chain):
    def forward(self, x: Tensor) -> Tensor:
        mask, weights = torch.linspace(0.5, 1.0, WIDTH)[None], torch.linspace(1.0, 2.0, len(x))[:, None]
        for block in self.blocks:
            output = block(x, mask=mask, given={"weights": [weights], "name": "n"})
            assert type(output) is {"tuple": tuple, "list": list, "dict": OrderedDict, "dataclass": Out}[block.kind]
            x = hidden(output)
        return x


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass"])
def test_containers_are_split_and_joined(kind: str) -> None:
    def caller() -> Caller:
        torch.manual_seed(0)
        module = Caller(0)
        module.blocks.extend(Nested() for _ in range(3))
        for block in module.blocks:
            block.kind = kind  # type: ignore[assignment]
        return module

    (x,) = inputs()
    assert_close(one_pass(caller(), x, 4, 3), plain_pass(caller(), x))


# -- refused


class Mixes(Block):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class Loss(Block):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.pow(2).mean()


class TakesFirst(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            output = block(x)
            x = output[0] if isinstance(output, tuple) else output
        return x


class SequenceFirst(nn.Module):
    """An attention whose samples are in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0]
        return attended[:, 0]


class HiddenAttention(nn.Module):
    """The same without a flag that says so: dimension 0 is the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.softmax(y @ y.t(), -1) @ y


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (Norm, "BatchNorm1d couples the samples"),
    (SequenceFirst, "MultiheadAttention has its batch in dimension 1"),
    (Mixes, "depends on the other samples"),
    (HiddenAttention, "depends on the other samples"),
    (Loss, r"returns a tensor of shape \(\)"),
]


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_what_couples_samples_is_refused_by_name(kind: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    module = TakesFirst(3)
    module.blocks[1] = kind()
    with pytest.raises(UnsupportedError, match=rf"micro_batches=4 cannot split .* 'blocks\.1': .*{reason}.*'keep'"):
        one_pass(module, inputs()[0], 4, 3)


def test_a_refused_batch_leaves_random_state_buffers_and_modes_as_they_were() -> None:
    torch.manual_seed(0)
    module = TakesFirst(3)
    module.blocks[1] = Mixes()
    modes = [each.training for each in module.modules()]
    with pytest.raises(UnsupportedError):
        one_pass(module, inputs()[0], 4, 3)
    assert [each.training for each in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())


def test_batch_norm_is_refused_before_anything_runs() -> None:
    module = nn.Sequential(*(Norm() for _ in range(3)))
    config = SuperpipeConfig(k=2, micro_batches=2)
    with pytest.raises(UnsupportedError, match="BatchNorm1d couples"):
        Session(module, config, CPU, trains=True, owns_root=True)


# -- traffic


def bytes_per_sample(num_parts: int) -> tuple[float, float]:
    """Return H2D and D2H bytes of a step for each sample, with so many parts of four samples."""
    module = chain(6)
    config = SuperpipeConfig(k=2, activations="recompute", micro_batches=num_parts)
    session = Session(module, config, CPU, trains=True, owns_root=True)
    num_samples = 4 * num_parts
    train(module, inputs(3, num_samples), lambda: session.step("train"))
    session.close()
    last = session.report().last_step
    return last.h2d_bytes / num_samples, last.d2h_bytes / num_samples


def test_eight_micro_batches_cut_bytes_per_sample_by_eight() -> None:
    one, eight = bytes_per_sample(1), bytes_per_sample(8)
    for before, after in zip(one, eight, strict=True):
        assert before / after == pytest.approx(8, rel=0.01)
