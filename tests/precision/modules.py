"""Small modules whose parameters, buffers and inputs take every way to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.engine.tiny import WIDTH, Block, batches, chain

__all__ = ["MODULES", "Case", "chain_case"]

VOCABULARY = 32


class Tied(nn.Module):
    """An embedding that is read again outside any module's call: an anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) * self.scale
        for block in self.blocks:
            h = block(h)
        return F.linear(h, self.embed.weight)


class Counted(nn.Module):
    """A block with a batch norm, a buffer that computes, and parameters that no dtype changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.BatchNorm1d(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.order = nn.Parameter(torch.randperm(WIDTH), requires_grad=False)
        self.register_buffer("shift", torch.linspace(0.001, 0.3, WIDTH))
        self.shift: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(F.relu(self.norm(self.up(x))))[:, self.order] + self.shift
        return x + (y if mask is None else y * mask)


class Masked(nn.Module):
    """Hands its blocks a float32 tensor that was made between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            mask = torch.full((WIDTH,), 0.9 + index / 100, device=x.device)
            x = block(x, mask=mask)
        return x


class Images(nn.Module):
    """Convolutions whose weights have their channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)) + x
        return x


class Case:
    """A module, its batches, how it is called and its loss; the same weights and batches each time."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        inputs: Callable[[], list[Tensor]],
        loss: Callable[[Any], Tensor] = lambda output: output.float().pow(2).mean(),
        call: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x),
    ) -> None:
        self._make, self._inputs, self._loss, self._call = make, inputs, loss, call

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self._make()

    def inputs(self) -> list[Tensor]:
        torch.manual_seed(1)
        return self._inputs()

    def loss(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._loss(self._call(module, x))


def chain_case(num_blocks: int = 4, num_batches: int = 4, *, width: int = WIDTH, dropout: float = 0.0) -> Case:
    """Equal blocks; also where something is asked of one unit among others."""
    return Case(lambda: chain(num_blocks, width=width, dropout=dropout), lambda: batches(num_batches, width=width))


def _tokens() -> list[Tensor]:
    return [torch.randint(VOCABULARY, (2, 6)) for _ in range(3)]


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    ).train()


def _llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)).train()


def _language_model(make: Callable[[], nn.Module]) -> Case:
    return Case(make, _tokens, lambda loss: loss, lambda module, x: module(input_ids=x, labels=x, use_cache=False).loss)


MODULES: dict[str, Case] = {
    "chain": chain_case(dropout=0.1),
    "tied": Case(Tied, _tokens),
    "masked": Case(Masked, lambda: batches(3)),
    "images": Case(
        lambda: Images().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda: [torch.randn(2, 4, 5, 5) for _ in range(3)],
    ),
    "gpt2": _language_model(_gpt2),
    "llama": _language_model(_llama),
}
