"""One training story that every front end tells, with streaming and without: a front end is one ``Case``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, CONTEXT, BATCH = 64, 16, 2
OPTIONS = {"k": 2, "adversary": {"max_delay_ms": 0.2}}


@dataclass(frozen=True)
class Story:
    """What happens in a run of ``num_steps`` optimizer steps.

    Attributes:
        accumulate: micro-batches of one step.
        clip: largest gradient norm; None clips nothing.
        bf16: autocast to bfloat16.
        recompute: activation checkpointing.
        resume_at: save after this step, and go on from the file with a new model; None does not.
    """

    num_steps: int = 4
    accumulate: int = 1
    clip: float | None = None
    bf16: bool = False
    recompute: bool = False
    resume_at: int | None = None


STORIES = {
    "plain": Story(),
    "accumulation and clipping": Story(accumulate=2, clip=0.1),
    "bf16": Story(bf16=True, clip=1.0),
    "checkpointing": Story(recompute=True),
    "resumed": Story(resume_at=2, clip=0.5, accumulate=2),
}


class Ending(NamedTuple):
    """What a run leaves: the losses after the last resumption, and all weights by name."""

    losses: list[float]
    weights: dict[str, Tensor]

    def equals(self, other: Ending) -> bool:
        """Whether every number is the same, bit for bit."""
        return (
            self.losses == other.losses
            and self.weights.keys() == other.weights.keys()
            and all(torch.equal(weight, other.weights[name]) for name, weight in self.weights.items())
        )


Case = Callable[[Story, Path, "bool | tuple[bool, bool]"], Ending]


def make_model(story: Story, seed: int = 0) -> GPT2LMHeadModel:
    """Return a small GPT-2 with dropout and a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=5, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
    )
    config.loss_type = "ForCausalLM"
    model = GPT2LMHeadModel(config)
    if story.recompute:
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def texts(story: Story) -> Tensor:
    """All token ids of the story, in order, shape (num_steps * accumulate * BATCH, CONTEXT)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (story.num_steps * story.accumulate * BATCH, CONTEXT), generator=generator)


def batches(story: Story, first_step: int, last_step: int) -> Iterator[tuple[bool, Tensor]]:
    """Yield whether the optimizer steps after a batch, and the batch, for the steps in a range."""
    ids = texts(story).split(BATCH)
    for number in range(first_step * story.accumulate, last_step * story.accumulate):
        yield (number + 1) % story.accumulate == 0, ids[number]


def parts(story: Story) -> list[tuple[int, int]]:
    """Ranges of steps that one model makes."""
    if story.resume_at is None:
        return [(0, story.num_steps)]
    return [(0, story.resume_at), (story.resume_at, story.num_steps)]


def streams_in(streamed: bool | tuple[bool, bool], part: int) -> bool:
    """Whether a part of the story is streamed: checkpoints must go from either kind of run to either."""
    return streamed if isinstance(streamed, bool) else streamed[part]


def seed_part(first_step: int) -> None:
    """Dropout draws from here on; a resumed run starts afresh."""
    torch.manual_seed(100 + first_step)


def ending(losses: list[Any], model: nn.Module) -> Ending:
    weights = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
    return Ending([float(torch.as_tensor(loss).detach()) for loss in losses], weights)
