"""Supervised fine-tuning of a causal language model: all weights, or LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from lightning_superpipe.errors import ConfigError, UnsupportedError
from lightning_superpipe.recipes.conversations import MASKED
from lightning_superpipe.recipes.extras import require
from lightning_superpipe.recipes.module import RecipeModule
from lightning_superpipe.recipes.networks import make_network, recompute_activations
from lightning_superpipe.recipes.tokens import load_tokenizer

__all__ = ["FineTuning"]

Batch = dict[str, Tensor]


class FineTuning(RecipeModule):
    """A causal language model that learns answers, or completions.

    Args:
        pretrained: folder or hub name with weights.
        config: fresh weights instead: ``model_type`` and options of the architecture's configuration.
        tokenizer: folder or hub name; None takes that of ``pretrained``, and bytes where there is none.
        dtype: of the weights in memory; ``"auto"`` keeps that of the file.
        lora: options of ``peft.LoraConfig``, such as ``{r: 8, target_modules: [q_proj, v_proj]}``; None trains all.
        recompute: keep only the input of each block in forward.
        generation: options of ``generate`` for predicting; by default the likeliest 64 tokens at most.
        kind: the transformers class that chooses the architecture.
        added_tokens: special tokens in addition to bytes.
        options: ``optimizer``, ``scheduler``, ``save_to``: see :class:`RecipeModule`. Of a LoRA the adapter is saved.

    Raises:
        ConfigError: the model, its tokenizer or the LoRA cannot be made so.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        lora: Mapping[str, Any] | None = None,
        recompute: bool = False,
        generation: Mapping[str, Any] | None = None,
        kind: str = "AutoModelForCausalLM",
        added_tokens: Sequence[str] = (),
        **options: Any,
    ) -> None:
        words = load_tokenizer(tokenizer or pretrained, added_tokens)
        if config is not None:
            config = _with_vocabulary(config, len(words))
        net: Any = make_network(kind, pretrained=pretrained, config=config, dtype=dtype)
        _refuse_foreign_tokenizer(net, words, tokenizer or pretrained)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config is not None or getattr(net.generation_config, name) is None:
                setattr(net.generation_config, name, getattr(words, name))
        if recompute:
            recompute_activations(net)
        super().__init__(net if lora is None else _with_lora(net, lora), words, **options)
        self.perplexity = Perplexity(ignore_index=MASKED)
        self._generation = dict(generation or {"max_new_tokens": 64, "do_sample": False})

    def setup(self, stage: str) -> None:
        """Refuse packed rows if this model would let their examples see each other."""
        if stage == "fit" and getattr(getattr(self.trainer, "datamodule", None), "is_packed", False):
            _refuse_leaks(self.net)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean nats per learned token; the batch holds ``input_ids`` and ``labels``, shape (B, T)."""
        logits, targets = self._predicted(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=MASKED)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of held-out text to the perplexity of learned tokens."""
        self.perplexity.update(*self._predicted(batch))
        self.log("val_perplexity", self.perplexity, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Answer prompts that are padded on the left, shape (B, T)."""
        return self.answers(batch)

    def answers(self, batch: Batch) -> list[str]:
        """Return what the model writes after each prompt."""
        written = self.net.generate(**batch, **self._generation)
        new = written[:, batch["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _predicted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits, shape (B, T - 1, V), and the tokens that they should have predicted, shape (B, T - 1)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.net(**inputs, use_cache=False).logits
        return logits[:, :-1].float(), batch["labels"][:, 1:]


def _with_vocabulary(config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the configuration for so many tokens; models with several towers have that of the text's nested."""
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], "vocab_size": num_tokens}}
    return {**config, "vocab_size": num_tokens}


def _refuse_foreign_tokenizer(net: Any, tokenizer: Any, name: str | None) -> None:
    """Raise ConfigError if the tokenizer has tokens that the network does not know."""
    known = net.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ConfigError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens, the model knows {known}: give the tokenizer that the "
            "model was trained with."
        )


def _with_lora(net: Any, options: Mapping[str, Any]) -> Any:
    """Return the model with low-rank adapters, and everything else frozen."""
    peft = require("peft")
    names = {key: list(value) if isinstance(value, list | tuple) else value for key, value in options.items()}
    try:
        return peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", **names))
    except (TypeError, ValueError) as error:
        layers = sorted(
            {name.split(".")[-1] for name, part in net.named_modules() if isinstance(part, torch.nn.Linear)}
        )
        raise ConfigError(
            f"lora={names!r} cannot be applied: {error}. Linear layers of this model: {', '.join(layers)}."
        ) from error


def _refuse_leaks(net: Any) -> None:
    """Raise UnsupportedError unless a packed example gets the logits that it gets alone."""
    is_training = net.training
    net.eval()
    first = torch.tensor([[1, 2, 3]])
    second = torch.tensor([[4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        alone = net(input_ids=second, use_cache=False).logits
        packed = net(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[:, 3:]
    net.train(is_training)
    if not torch.allclose(alone, packed, rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
        raise UnsupportedError(
            f"packing=true, but in {type(net).__name__} packed examples would see each other: this architecture does "
            "not tell them apart by their positions. Use packing=false."
        )
