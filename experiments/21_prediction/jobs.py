"""What is trained: models whose compute takes as long as it is told to, and real ones, each behind an emulated link."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """Computes nearly nothing, but takes a time, and twice as long in backward, and saves so many floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float, num_saved: int) -> Tensor:
        deadline = time.perf_counter() + seconds
        ctx.seconds = seconds
        ctx.save_for_backward(x, weight, torch.empty(num_saved))
        y = x + weight[0]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _, weight, _ = ctx.saved_tensors  # recomputed, or waited for, before this compute begins
        deadline = time.perf_counter() + 2 * ctx.seconds
        gradient = torch.full_like(weight, 1e-3)
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return gradients[0].clone(), gradient, None, None


class Block(nn.Module):
    """A large weight, and a time in place of what a device would compute with it."""

    def __init__(self, num_parameters: int, seconds: float, num_saved: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_parameters) * 1e-3)
        self.seconds, self.num_saved = seconds, num_saved

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Work.apply(x, self.weight, self.seconds, self.num_saved)
        return y


def told(sizes: list[float], milliseconds: list[float], saved: list[float]) -> Callable[[], Any]:
    """A chain of blocks: megabytes of weights, milliseconds of forward and megabytes of activations of each."""

    def make() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(SEED)
        blocks = [
            Block(int(size * MB / FLOAT), ms / 1e3, int(held * MB / FLOAT))
            for size, ms, held in zip(sizes, milliseconds, saved, strict=True)
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
    """All models of this experiment."""
    uneven = [2.0, 4.0, 6.0, 4.0] * 3
    even = told([4.0] * 12, [5.0] * 12, [3.0] * 12)
    varied = told(uneven, [1.5 * size for size in uneven], [0.5 * size for size in uneven])
    base = [
        Job("even, compute-bound", even, "Block", _link(2.0), True),
        Job("even, transfer-bound", even, "Block", _link(0.4), True),
        Job("uneven, balanced", varied, "Block", _link(0.8), True),
        Job("GPT-2", gpt2(192, 8, 8), "GPT2Block", _link(0.4), False),
        Job("Llama", llama(192, 8, 8), "LlamaDecoderLayer", _link(0.25), False),
    ]
    return [replace(job) for job in base]
