"""The model, the batch and the optimizer that all contenders share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu_proof.job import Job

__all__ = ["LEARNING_RATE", "loss_of", "make_batch", "make_model", "make_optimizer", "num_parameters_of"]

LEARNING_RATE = 1e-3
_STD = 0.02
_POOL = 1 << 22
_STRIDE = 999_983  # prime: each parameter begins elsewhere in the pool


def make_model(job: Job) -> Any:
    """Return a Llama in bfloat16 on the host, the same for equal seeds.

    Its weights are stretches of one pool of normal numbers: to draw billions takes longer than to train on them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scale = job.scale
    config = LlamaConfig(
        hidden_size=scale.width,
        intermediate_size=scale.mlp_width,
        num_hidden_layers=scale.num_blocks,
        num_attention_heads=scale.num_heads,
        num_key_value_heads=scale.num_kv_heads,
        vocab_size=scale.vocabulary,
        max_position_embeddings=scale.num_tokens,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers have no values after to_empty
    _fill(model, job.seed)
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(job.task != "infer")


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Give matrices normal numbers, and vectors (they are norms) ones."""
    pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)) * _STD).to(torch.bfloat16)
    start = 0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat, done = parameter.view(-1), 0
        while done < flat.numel():
            start = (start + _STRIDE) % _POOL
            count = min(flat.numel() - done, _POOL - start)
            flat[done : done + count] = pool[start : start + count]
            done += count


def make_batch(job: Job) -> Tensor:
    """Return tokens on the host, shape (batch, tokens). All steps see them, so that what trains can be seen to."""
    scale = job.scale
    shape = (scale.batch_size, scale.num_tokens)
    return torch.randint(scale.vocabulary, shape, generator=torch.Generator().manual_seed(job.seed + 1))


def make_optimizer(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Return AdamW in torch's fused kernels, wherever the parameters are."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Return the language-modelling loss, a scalar."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def num_parameters_of(model: nn.Module) -> int:
    """Count weights."""
    return sum(parameter.numel() for parameter in model.parameters())
