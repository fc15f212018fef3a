"""One shrunken recipe, run with and without streaming."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.config import Adversary
from lightning_superpipe.recipes.module import RecipeModule

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
NUM_STEPS = 3

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256}


class Recipe(NamedTuple):
    """What makes the module and the data of a recipe."""

    module: Callable[[], RecipeModule]
    data: Callable[[], L.LightningDataModule]


class Outcome(NamedTuple):
    """What a run left behind."""

    losses: list[Tensor]
    metrics: dict[str, Tensor]
    weights: dict[str, Tensor]
    predictions: list[Any]


class _Losses(Callback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(outputs["loss"].detach().clone())


def make_trainer(strategy: Any = "auto", **options: Any) -> L.Trainer:
    """Return a quiet trainer of a few steps, with one validation."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = {"max_steps": NUM_STEPS, "val_check_interval": NUM_STEPS, "limit_val_batches": 1} | options
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_predict_batches=1,
        check_val_every_n_epoch=None,
        **chosen,
    )


def streamed(k: int = 2) -> SuperpipeStrategy:
    """Return the strategy under test, in hostile conditions."""
    return SuperpipeStrategy(k=k, adversary=Adversary(poison=True, shuffle_slots=True))


def run(recipe: Recipe, strategy: Any = "auto", **options: Any) -> Outcome:
    """Train a few steps, validate once, predict one batch."""
    L.seed_everything(0, verbose=False)
    module, data = recipe.module(), recipe.data()
    losses = _Losses()
    trainer = make_trainer(strategy, callbacks=[losses], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data)
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        predictions: list[Any] = trainer.predict(module, datamodule=data) or []
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    return Outcome(losses.found, metrics, weights, predictions)


def assert_same_with_and_without_streaming(recipe: Recipe, **options: Any) -> Outcome:
    """Compare everything by `torch.equal`; return what both runs left."""
    plain = run(recipe, **options)
    strategy = streamed()
    candidate = run(recipe, strategy, **options)
    assert len(strategy.units) > 2
    assert strategy.report().total.num_loads > 0
    _assert_equal(plain, candidate)
    before = recipe_weights(recipe)
    assert any(not torch.equal(before[name], value) for name, value in plain.weights.items()), "nothing was learned"
    return plain


def recipe_weights(recipe: Recipe) -> dict[str, Tensor]:
    """Return the weights that a run starts with."""
    L.seed_everything(0, verbose=False)
    return {name: value.clone() for name, value in recipe.module().state_dict().items()}


def _assert_equal(one: Outcome, other: Outcome) -> None:
    assert len(one.losses) == len(other.losses) == NUM_STEPS
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True)), (one.losses, other.losses)
    for ours, theirs in ((one.metrics, other.metrics), (one.weights, other.weights)):
        assert ours.keys() == theirs.keys()
        assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    for first, second in zip(one.predictions, other.predictions, strict=True):
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second
