"""The demo's run: fit, validate and predict with one trainer, then tell what happened."""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import lightning as L
import torch
from humanize import naturalsize
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.demo.model import ByteGPT, Size
from lightning_superpipe.demo.results import Results, conclusion, write_results
from lightning_superpipe.demo.text import FILE_END, Corpus, HeldOutWindows, RandomWindows, read_standard_library

__all__ = ["run"]

_PROMPT = b"\ndef "
_NUM_SAMPLES = 3
_RECORDED_STEP = 12  # like all later ones
_NUM_HELD_OUT_WINDOWS = 64
_STATE_BYTES = 16  # for each parameter: weight, gradient and two moments in fp32


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
    corpus = read_standard_library()
    size = Size(options.layers, options.width, options.context)
    module = ByteGPT(size, num_steps=options.steps, learning_rate=options.learning_rate)
    strategy = SuperpipeStrategy(
        k=options.k,
        k_prime=options.k_prime,
        device_memory=options.device_memory,
        record_step=min(_RECORDED_STEP, options.steps - 1),
    )
    print(_introduction(strategy.config.device_memory, module, corpus), flush=True)
    results = _train_and_write(options, command, module, strategy, corpus)
    paths = write_results(results, options.out)
    print(conclusion(results, corpus.frequency_bits(), paths))


def _train_and_write(
    options: argparse.Namespace, command: list[str], module: ByteGPT, strategy: SuperpipeStrategy, corpus: Corpus
) -> Results:
    """Train, and let the trained network write; the report is that of training."""
    trainer = _make_trainer(options.steps, strategy)
    start = time.perf_counter()
    trainer.fit(module, *_texts(options, corpus))
    seconds = time.perf_counter() - start
    report, recording = strategy.report(), strategy.recording
    assert recording is not None, "record_step names a step that ran"
    return Results(
        report=report,
        recording=recording,
        losses=[loss.item() for loss in module.losses],
        held_out_bits_per_byte=float(trainer.callback_metrics["val_bits"]),
        seconds=seconds,
        samples=_written(trainer, module),
        command=command,
    )


def _make_trainer(num_steps: int, strategy: SuperpipeStrategy) -> L.Trainer:
    num_validations = next(count for count in (3, 2, 1) if num_steps % count == 0)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        gradient_clip_val=1.0,
        val_check_interval=num_steps // num_validations,
        num_sanity_val_steps=0,
        callbacks=[RichProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )


def _texts(options: argparse.Namespace, corpus: Corpus) -> tuple[DataLoader[torch.Tensor], DataLoader[torch.Tensor]]:
    """Return loaders of what to learn from and of held-out text; a window is one byte longer than what is predicted."""
    num_bytes, batch_size = options.context + 1, options.batch_size
    windows = RandomWindows(corpus.train, options.steps * batch_size, num_bytes, seed=options.seed)
    held_out = HeldOutWindows(corpus.held_out, _NUM_HELD_OUT_WINDOWS, num_bytes)
    return DataLoader(windows, batch_size=batch_size), DataLoader(held_out, batch_size=16)


def _written(trainer: L.Trainer, module: ByteGPT) -> list[str]:
    """Return texts that the network makes up after a prompt."""
    prompts = torch.tensor([list(_PROMPT)] * _NUM_SAMPLES)
    batches = trainer.predict(module, DataLoader(prompts, batch_size=_NUM_SAMPLES))  # type: ignore[arg-type]
    rows = [row for batch in batches or [] for row in batch]
    texts = (bytes(row.tolist()).split(bytes([FILE_END]))[0] for row in rows)
    return [text.decode(errors="replace").strip("\n") for text in texts]


def _introduction(device_memory: int | str | None, module: ByteGPT, corpus: Corpus) -> str:
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
