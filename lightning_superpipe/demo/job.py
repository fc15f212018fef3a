"""The demo's run: fit, validate and predict with one trainer, then tell what happened."""

from __future__ import annotations

import argparse
import functools
import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from humanize import naturalsize
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.demo.results import Results, conclusion, write_results
from lightning_superpipe.recipes.language_model import ByteLanguageModel, SourceCode
from lightning_superpipe.recipes.module import warmup_cosine
from lightning_superpipe.recipes.text import Corpus

__all__ = ["run"]

_RECORDED_STEP = 12  # like all later ones
_STATE_BYTES = 16  # for each parameter: weight, gradient and two moments in fp32


class _Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(outputs["loss"].detach())


def run(options: argparse.Namespace, command: list[str]) -> None:
    """Run the whole demo and print what it found.

    Args:
        options: what the command line said.
        command: the command line itself, for the report.

    Raises:
        SuperpipeError: the window does not fit the device, or there is no text.
        OSError: the folder for the results cannot be written.
    """
    _quieten()
    options.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(options.seed, verbose=False)
    texts = _texts(options)
    module = _make_module(options)
    strategy = SuperpipeStrategy(
        k=options.k,
        k_prime=options.k_prime,
        device_memory=options.device_memory,
        record_step=min(_RECORDED_STEP, options.steps - 1),
    )
    print(_introduction(strategy.config.device_memory, module, texts.corpus), flush=True)
    results = _train_and_write(options, command, module, strategy, texts)
    paths = write_results(results, options.out)
    print(conclusion(results, texts.corpus.frequency_bits(), paths))


def _train_and_write(
    options: argparse.Namespace,
    command: list[str],
    module: ByteLanguageModel,
    strategy: SuperpipeStrategy,
    texts: SourceCode,
) -> Results:
    """Train, and let the trained network write; the report is that of training."""
    losses = _Losses()
    trainer = _make_trainer(options.steps, strategy, losses)
    start = time.perf_counter()
    trainer.fit(module, datamodule=texts)
    seconds = time.perf_counter() - start
    report, recording = strategy.report(), strategy.recording
    assert recording is not None, "record_step names a step that ran"
    return Results(
        report=report,
        recording=recording,
        losses=[loss.item() for loss in losses.found],
        held_out_bits_per_byte=float(trainer.callback_metrics["val_bits"]),
        seconds=seconds,
        samples=_written(trainer, module, texts),
        command=command,
    )


def _make_trainer(num_steps: int, strategy: SuperpipeStrategy, losses: Callback) -> L.Trainer:
    num_validations = next(count for count in (3, 2, 1) if num_steps % count == 0)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        gradient_clip_val=1.0,
        val_check_interval=num_steps // num_validations,
        num_sanity_val_steps=0,
        callbacks=[RichProgressBar(), losses],
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )


def _make_module(options: argparse.Namespace) -> ByteLanguageModel:
    """Return a GPT-2 with AdamW, warm-up and a cosine; ``fused`` is the user's own choice, as in plain training."""
    shape = {"n_layer": options.layers, "n_embd": options.width, "n_head": max(1, options.width // 64)}
    rate = {"lr": options.learning_rate, "betas": (0.9, 0.95)}
    return ByteLanguageModel(
        {"model_type": "gpt2", "n_positions": options.context, "activation_function": "gelu_pytorch_tanh", **shape},
        recompute=True,
        generation={"max_length": options.context, "do_sample": True, "temperature": 0.7, "top_k": 40},
        optimizer=functools.partial(torch.optim.AdamW, fused=True, **rate),
        scheduler=functools.partial(warmup_cosine, num_steps=options.steps),
    )


def _texts(options: argparse.Namespace) -> SourceCode:
    """Return the standard library's source, with as many windows as the steps ask for."""
    num_windows = options.steps * options.batch_size
    return SourceCode(
        context=options.context, batch_size=options.batch_size, num_windows=num_windows, seed=options.seed
    )


def _written(trainer: L.Trainer, module: ByteLanguageModel, texts: SourceCode) -> list[str]:
    """Return texts that the network makes up after a prompt."""
    batches: list[Any] = trainer.predict(module, datamodule=texts) or []
    return [text.strip("\n") for batch in batches for text in batch]


def _introduction(device_memory: int | str | None, module: ByteLanguageModel, corpus: Corpus) -> str:
    num_parameters = sum(parameter.numel() for parameter in module.net.parameters())
    state = naturalsize(num_parameters * _STATE_BYTES, binary=True)
    text, device = naturalsize(len(corpus.train), binary=True), naturalsize(device_memory or 0, binary=True)
    return (
        f"A GPT-2 with {num_parameters / 1e6:.1f} M parameters learns Python's standard library byte by byte: "
        f"{text} of source in {corpus.num_train_files} files, {corpus.num_held_out_files} more are held out.\n"
        f"Its weights, gradients and AdamW states take {state}; the device has {device}.\n"
        "The device is emulated in this machine's own memory: this shows that the bytes stay within the budget, not "
        "speed.\n"
    )


def _quieten() -> None:
    """Leave out what Lightning says about hardware and loaders: a first run should show little else than the run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
