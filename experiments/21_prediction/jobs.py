"""What is trained: models whose compute takes as long as it is told to, and real ones, each behind an emulated link."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_superpipe import Link

SEED = 1
FLOAT = 4
MB = 1_000_000
VOCABULARY, LENGTH = 256, 64


@dataclass(frozen=True)
class Job:
    """One model behind one link.

    Attributes:
        make: returns the model and what computes a loss with it; the same weights each time.
        units: class of its units.
        told: compute takes a time it was told, as an accelerator's would leave the host's processors free meanwhile.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    units: str
    link: Link
    told: bool


class Work(torch.autograd.Function):
    """Computes nearly nothing, but takes a time each way, and saves so many floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: tuple[float, float], num_saved: int, *weights: Tensor) -> Tensor:
        deadline = time.perf_counter() + seconds[0]
        ctx.seconds = seconds[1]
        ctx.save_for_backward(x, torch.empty(num_saved), *weights)
        y = x + weights[0][0]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _, _, *weights = ctx.saved_tensors  # recomputed, or waited for, before this compute begins
        deadline = time.perf_counter() + ctx.seconds
        wanted = [
            torch.full_like(weight, 1e-3) if is_wanted else None
            for weight, is_wanted in zip(weights, ctx.needs_input_grad[3:], strict=True)
        ]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return gradients[0].clone(), None, None, *wanted


class Block(nn.Module):
    """A large weight, and a time in place of what a device would compute with it.

    Args:
        milliseconds: of its forward; a backward takes twice as long, or as long where the large weight is frozen.
        adapter: megabytes of a second weight, 0 for none.
    """

    def __init__(self, size: float, milliseconds: float, held: float, *, is_frozen: bool, adapter: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(int(size * MB / FLOAT)) * 1e-3, requires_grad=not is_frozen)
        self.adapter = nn.Parameter(torch.zeros(int(adapter * MB / FLOAT))) if adapter else None
        self.seconds = milliseconds / 1e3, milliseconds / 1e3 * (1 if is_frozen else 2)
        self.num_saved = int(held * MB / FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weight] if self.adapter is None else [self.weight, self.adapter]
        y: Tensor = Work.apply(x, self.seconds, self.num_saved, *weights)
        return y


def told(
    sizes: list[float], milliseconds: list[float], saved: list[float], *, num_frozen: int = 0, adapter: float = 0.0
) -> Callable[[], Any]:
    """A chain of blocks: megabytes of weights, milliseconds of forward and megabytes of activations of each.

    Args:
        num_frozen: the first so many have a frozen weight.
        adapter: megabytes of a small weight that is trained in each, 0 for none.
    """

    def make() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(SEED)
        blocks = [
            Block(size, ms, held, is_frozen=index < num_frozen, adapter=adapter)
            for index, (size, ms, held) in enumerate(zip(sizes, milliseconds, saved, strict=True))
        ]
        x = torch.ones(int(0.5 * MB / FLOAT))
        return nn.Sequential(*blocks), lambda net: net(x).mean()

    return make


def _tokens(num_samples: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_samples, LENGTH), generator=torch.Generator().manual_seed(SEED))


def gpt2(width: int, num_blocks: int, num_samples: int) -> Callable[[], Any]:
    """A GPT-2 with random weights."""

    def make() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(SEED)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=num_blocks, n_head=4)
        ids = _tokens(num_samples)
        return GPT2LMHeadModel(config).train(), lambda net: net(input_ids=ids, labels=ids, use_cache=False).loss

    return make


def llama(width: int, num_blocks: int, num_samples: int) -> Callable[[], Any]:
    """A Llama with random weights."""

    def make() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        ids = _tokens(num_samples)
        return LlamaForCausalLM(config).train(), lambda net: net(input_ids=ids, labels=ids, use_cache=False).loss

    return make


def _link(gb_s: float) -> Link:
    return Link(h2d_gb_s=gb_s, d2h_gb_s=gb_s, latency_ms=0.05)


def jobs() -> list[Job]:
    """All models whose settings are predicted."""
    sizes, even_ms, even_mb = [4.0] * 12, [12.0] * 12, [3.0] * 12
    even, uneven = told(sizes, even_ms, even_mb), [2.0, 4.0, 6.0, 4.0] * 3
    varied = told(uneven, [3.0 * size for size in uneven], [0.5 * size for size in uneven])
    return [
        Job("even, compute-bound", even, "Block", _link(1.0), True),
        Job("even, transfer-bound", even, "Block", _link(0.15), True),
        Job("uneven, balanced", varied, "Block", _link(0.35), True),
        Job("adapters", told(sizes, even_ms, even_mb, num_frozen=12, adapter=0.5), "Block", _link(0.2), True),
        Job("first half frozen", told(sizes, even_ms, even_mb, num_frozen=6), "Block", _link(0.25), True),
        Job("GPT-2", gpt2(192, 8, 8), "GPT2Block", _link(0.4), False),
        Job("Llama", llama(192, 8, 8), "LlamaDecoderLayer", _link(0.4), False),
    ]


def sweep_jobs() -> list[Job]:
    """Those of the sweep: smaller, since each is run with every setting."""
    small = told([3.0] * 8, [12.0] * 8, [3.0] * 8)
    uneven = [1.5, 3.0, 4.5, 3.0] * 2
    varied = told(uneven, [4.0 * size for size in uneven], [1.2 * size for size in uneven])
    return [
        Job("fast link", small, "Block", _link(1.0), True),
        Job("balanced link", small, "Block", _link(0.25), True),
        Job("slow link", small, "Block", _link(0.1), True),
        Job("uneven units", varied, "Block", _link(0.25), True),
    ]
