"""The story in each front end's own words; ``CASES`` is what the parity test runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lightning_superpipe import (
    FabricSuperpipeStrategy,
    SuperpipeAccelerator,
    SuperpipeStrategy,
    SuperpipeTrainer,
    attach,
)
from tests.frontends.story import (
    BATCH,
    OPTIONS,
    Case,
    Ending,
    Story,
    batches,
    ending,
    make_model,
    make_optimizer,
    parts,
    seed_part,
    streams_in,
    texts,
)

Streamed = bool | tuple[bool, bool]


def plain(story: Story, folder: Path, streamed: Streamed) -> Ending:
    file, losses = folder / "plain.pt", []
    for part, (first, last) in enumerate(parts(story)):
        model = make_model(story, seed=part)
        optimizer = make_optimizer(model)
        if part:
            state = torch.load(file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        seed_part(first)
        losses = []
        is_streamed = streams_in(streamed, part)
        with attach(model, optimizer, device="cpu", **OPTIONS) if is_streamed else contextlib.nullcontext():
            for is_last, ids in batches(story, first, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=story.bf16):
                    loss = model(input_ids=ids, labels=ids).loss
                (loss / story.accumulate).backward()
                losses.append(loss)
                if is_last:
                    if story.clip:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), story.clip)
                    optimizer.step()
                    optimizer.zero_grad()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return ending(losses, model)


def fabric(story: Story, folder: Path, streamed: Streamed) -> Ending:
    file, losses = folder / "fabric.ckpt", []
    for part, (first, last) in enumerate(parts(story)):
        strategy: Any = FabricSuperpipeStrategy(**OPTIONS) if streams_in(streamed, part) else "auto"
        launched = Fabric(
            accelerator="cpu", devices=1, strategy=strategy, precision="bf16-mixed" if story.bf16 else "32-true"
        )
        net = make_model(story, seed=part)
        model, optimizer = launched.setup(net, make_optimizer(net))
        if part:
            launched.load(file, {"model": model, "optimizer": optimizer})
        seed_part(first)
        losses = []
        for is_last, ids in batches(story, first, last):
            loss = model(input_ids=ids, labels=ids).loss
            launched.backward(loss / story.accumulate)
            losses.append(loss)
            if is_last:
                if story.clip:
                    launched.clip_gradients(model, optimizer, max_norm=story.clip)
                optimizer.step()
                optimizer.zero_grad()
        launched.save(file, {"model": model, "optimizer": optimizer})
        if streams_in(streamed, part):
            strategy.teardown()
    return ending(losses, net)


def accelerate(story: Story, folder: Path, streamed: Streamed) -> Ending:
    losses = []
    for part, (first, last) in enumerate(parts(story)):
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the last accelerator's precision
        arguments: dict[str, Any] = {
            "cpu": True,
            "mixed_precision": "bf16" if story.bf16 else "no",
            "gradient_accumulation_steps": story.accumulate,
        }
        is_streamed = streams_in(streamed, part)
        accelerator = SuperpipeAccelerator(superpipe=OPTIONS, **arguments) if is_streamed else Accelerator(**arguments)
        net = make_model(story, seed=part)
        optimizer, model = accelerator.prepare(make_optimizer(net), net)
        if part:
            accelerator.load_state(folder / "accelerate")
        seed_part(first)
        losses = []
        for _, ids in batches(story, first, last):
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                losses.append(loss)
                if story.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), story.clip)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / "accelerate")
        accelerator.free_memory()
    return ending(losses, net)


def transformers(story: Story, folder: Path, streamed: Streamed) -> Ending:
    data: Any = [{"input_ids": ids, "labels": ids} for ids in texts(story)]
    for part, (_, last) in enumerate(parts(story)):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = TrainingArguments(
            str(folder / "transformers"),
            use_cpu=True,
            max_steps=story.num_steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=story.accumulate,
            max_grad_norm=story.clip or 0.0,
            bf16=story.bf16,
            gradient_checkpointing=story.recompute,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            save_steps=last,
            report_to=[],
            disable_tqdm=True,
        )
        own: Any = {"superpipe": OPTIONS} if streams_in(streamed, part) else {}
        make: Any = SuperpipeTrainer if own else Trainer
        model = make_model(story, seed=part)
        trainer = make(model, arguments, train_dataset=data, eval_dataset=data[:BATCH], **own)
        trainer.train(resume_from_checkpoint=bool(part))
    history = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return ending(history, model)


class Told(L.LightningModule):
    """The story as a LightningModule."""

    def __init__(self, story: Story, seed: int) -> None:
        super().__init__()
        self.net = make_model(story, seed)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self)


def lightning(story: Story, folder: Path, streamed: Streamed) -> Ending:
    file = folder / "lightning.ckpt"
    for part, (first, last) in enumerate(parts(story)):
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=SuperpipeStrategy(**OPTIONS) if streams_in(streamed, part) else "auto",
            max_steps=last,
            accumulate_grad_batches=story.accumulate,
            gradient_clip_val=story.clip,
            precision="bf16-mixed" if story.bf16 else "32-true",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Told(story, seed=part)
        ids = torch.cat([ids for _, ids in batches(story, first, last)])
        seed_part(first)
        trainer.fit(module, DataLoader(ids, batch_size=BATCH), ckpt_path=file if part else None)  # type: ignore[arg-type]
        trainer.save_checkpoint(file)
    return ending(module.losses, module.net)


CASES: dict[str, Case] = {
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
    "plain": plain,
    "transformers": transformers,
}
