"""The demo's module: nothing in it knows of streaming."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_superpipe.demo.text import FILE_END

__all__ = ["ByteGPT", "Size"]

_WARMUP_STEPS = 10
_LAST_RATE = 0.1  # of the highest


@dataclass(frozen=True)
class Size:
    """Shape of the network.

    Attributes:
        num_layers: blocks.
        width: of the residual stream; each head has 64 of it.
        context: bytes that a prediction may look back.
    """

    num_layers: int
    width: int
    context: int


class ByteGPT(L.LightningModule):
    """A GPT-2 over bytes, trained with AdamW, warm-up and a cosine.

    Args:
        num_steps: length of the learning-rate schedule.
        learning_rate: its highest value.
    """

    def __init__(self, size: Size, *, num_steps: int, learning_rate: float) -> None:
        super().__init__()
        self.net = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256,
                n_positions=size.context,
                n_embd=size.width,
                n_layer=size.num_layers,
                n_head=max(1, size.width // 64),
                activation_function="gelu_pytorch_tanh",
                bos_token_id=FILE_END,
                eos_token_id=FILE_END,
            )
        )
        _recompute_activations(self.net)
        self.bits_per_byte = MeanMetric()
        self.losses: list[Tensor] = []
        self._num_steps, self._learning_rate = num_steps, learning_rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean nats per byte of a batch, shape (B, context + 1)."""
        loss = self._nats_per_byte(batch)
        self.losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch of held-out text to the metric."""
        self.bits_per_byte.update(self._nats_per_byte(batch) / math.log(2))
        self.log("val_bits", self.bits_per_byte, prog_bar=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Continue prompts, shape (B, T), up to the end of the context."""
        net: Any = self.net  # its own types forbid calling this method
        written: Tensor = net.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            pad_token_id=FILE_END,
            max_length=self.net.config.n_positions,
            do_sample=True,
            temperature=0.7,
            top_k=40,
        )
        return written

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule; ``fused`` is this demo's own choice, as it would be in plain training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = {"scheduler": LambdaLR(optimizer, self._rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the highest."""
        progress = min(1.0, step / max(1, self._num_steps))
        cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        return min(1.0, (step + 1) / _WARMUP_STEPS) * cosine

    def _nats_per_byte(self, batch: Tensor) -> Tensor:
        logits = self.net(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _recompute_activations(net: GPT2LMHeadModel) -> None:
    """Keep only the input of each block in forward, else activations would be larger than all the rest."""
    enable: Any = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
    enable()
