"""What is measured: one stage of a run, through each front end, the ordinary way or streamed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from accelerate import Accelerator
from memory import Memory
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lightning_superpipe import SuperpipeAccelerator, SuperpipeStrategy, SuperpipeTrainer

STAGES = ("load", "save", "resume", "export")
VOCABULARY, TOKENS = 4096, 16
WINDOW = {"k": 2}


class Pretrained(L.LightningModule):
    """A causal language model from a folder, loaded where Lightning says."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = LlamaForCausalLM.from_pretrained(self.folder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits: Tensor = self.net(input_ids=batch, use_cache=False).logits
        return logits.argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


def lightning(stage: str, way: str, folder: Path, memory: Memory) -> None:
    """Lightning's Trainer."""
    strategy: Any = SuperpipeStrategy(**WINDOW) if way == "superpipe" else "auto"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=1, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(torch.randint(VOCABULARY, (2, TOKENS)), batch_size=1)
    module, file = Pretrained(folder), folder.parent / f"{way}.ckpt"
    if stage == "load":
        with memory.measure():
            trainer.predict(module, data)
        return
    if stage == "resume":
        with memory.measure():
            trainer.fit(module, data, ckpt_path=file)  # which has made all its steps already
        return
    trainer.fit(module, data)
    with memory.measure():
        if stage == "save":
            trainer.save_checkpoint(file)
        else:
            module.net.save_pretrained(folder.parent / f"{way}_export")


def accelerate(stage: str, way: str, folder: Path, memory: Memory) -> None:
    """A loop with Accelerate."""
    own = {"superpipe": WINDOW} if way == "superpipe" else {}
    accelerator: Any = (SuperpipeAccelerator if own else Accelerator)(cpu=True, **own)
    ids, state = torch.randint(VOCABULARY, (1, TOKENS)), folder.parent / f"{way}_state"
    with memory.measure() if stage in ("load", "resume") else contextlib.nullcontext():
        net: Any = LlamaForCausalLM.from_pretrained(folder)
        if stage == "load":
            with torch.no_grad():
                accelerator.prepare(net)(input_ids=ids, use_cache=False)
            return
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True))
        if stage == "resume":
            accelerator.load_state(state)
            return
    accelerator.backward(net(input_ids=ids, labels=ids, use_cache=False).loss)
    optimizer.step()
    optimizer.zero_grad()
    with memory.measure():
        if stage == "save":
            accelerator.save_state(state)
        else:
            accelerator.unwrap_model(net).save_pretrained(folder.parent / f"{way}_export")


class Measuring(TrainerCallback):
    """Measures a resumption until training begins, or a save from the end of its step."""

    def __init__(self, memory: Memory, stage: str) -> None:
        self.memory, self.stage, self.scope = memory, stage, contextlib.ExitStack()

    def begin(self) -> None:
        self.scope.enter_context(self.memory.measure())

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.scope.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.stage == "save":
            self.begin()

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.scope.close()


def transformers(stage: str, way: str, folder: Path, memory: Memory) -> None:
    """The Trainer of transformers."""
    written, measuring = folder.parent / f"{way}_trainer", Measuring(memory, stage)
    arguments = TrainingArguments(
        str(written), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, per_device_train_batch_size=1,
        per_device_eval_batch_size=1, prediction_loss_only=True, save_strategy="steps" if stage == "save" else "no",
        save_steps=1,
    )  # fmt: skip
    data: Any = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (2, TOKENS))]
    own = {"superpipe": WINDOW} if way == "superpipe" else {}
    if stage in ("load", "resume"):
        measuring.begin()
    net = LlamaForCausalLM.from_pretrained(folder)
    make: Any = SuperpipeTrainer if own else Trainer
    trainer = make(net, arguments, train_dataset=data, callbacks=[measuring], **own)
    if stage == "load":
        trainer.predict(data)
        measuring.scope.close()
        return
    trainer.train(resume_from_checkpoint=str(written / "checkpoint-1") if stage == "resume" else None)
    if stage == "export":
        with memory.measure():
            trainer.save_model(str(folder.parent / f"{way}_export"))


FRONTS = {"lightning": lightning, "accelerate": accelerate, "transformers": transformers}
