"""What all recipe modules share: an optimizer and a schedule given from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["MakeOptimizer", "MakeScheduler", "RecipeModule", "warmup_cosine"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class RecipeModule(L.LightningModule):
    """A network that trains whatever of it requires gradients.

    Args:
        net: a network of transformers, or of peft.
        tokenizer: is saved with the network; None if it has none.
        optimizer: makes the optimizer from parameters, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        scheduler: makes the schedule from the optimizer; it advances every step. None keeps the rate.
        save_to: a folder for the weights after training, which ``pretrained`` reads; None saves nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        tokenizer: Any = None,
        *,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        scheduler: MakeScheduler | None = None,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.net: Any = net  # its own types forbid calling much of it
        self.tokenizer = tokenizer
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self._save_to = save_to

    def on_fit_end(self) -> None:
        """Save what was learned, if asked to."""
        if self._save_to is not None:
            Path(self._save_to).mkdir(parents=True, exist_ok=True)
            self.net.save_pretrained(self._save_to)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(self._save_to)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with its schedule if there is one."""
        optimizer = self._make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        if self._make_scheduler is None:
            return optimizer
        schedule = {"scheduler": self._make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def warmup_cosine(
    optimizer: Optimizer, *, num_steps: int, num_warmup_steps: int = 10, last_share: float = 0.1
) -> LambdaLR:
    """Return a schedule that rises linearly and falls as half a cosine.

    Args:
        num_steps: when the lowest rate is reached; it stays there.
        num_warmup_steps: steps of the rise.
        last_share: of the optimizer's rate that is left in the end.
    """

    def share(step: int) -> float:
        progress = min(1.0, step / max(1, num_steps))
        cosine = last_share + (1 - last_share) * (1 + math.cos(math.pi * progress)) / 2
        return min(1.0, (step + 1) / max(1, num_warmup_steps)) * cosine

    return LambdaLR(optimizer, share)
