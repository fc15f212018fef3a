"""Accelerate's and transformers' saves, killed at any moment: the checkpoint before is whole, and found."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_superpipe import SuperpipeAccelerator, SuperpipeTrainer
from tests.frontends.story import Story, make_model, texts
from tests.processes import CONTEXT

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 384
NUM_STEPS = 300  # more than are made before the kill
DATA: Any = [{"input_ids": ids, "labels": ids} for ids in texts(Story(num_steps=NUM_STEPS))]
NUM_RENAMES = 3  # of a save over another: complete, the old one away, the new one there


class Count:
    """An object of the user's, registered for checkpointing."""

    number = -1

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def killed(work: Callable[..., None], *arguments: Any, wait_ms: float | None) -> None:
    """Let a process save until it is killed: after a time, or (None) by itself."""
    began = CONTEXT.Event()
    process = CONTEXT.Process(target=work, args=(*arguments, began))
    process.start()
    assert began.wait(120)
    if wait_ms is not None:
        time.sleep(wait_ms / 1e3)
        process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def die_at_rename(number: int, *, after: bool) -> None:
    """Kill this process just before or after a rename of folders to come, counted from zero."""
    rename, calls = Path.rename, itertools.count()

    def deadly(self: Path, target: Any) -> Any:
        is_last = next(calls) == number
        if is_last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(self, target)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.rename = deadly  # type: ignore[method-assign]


# -- Accelerate


def prepared(kind: Any = SuperpipeAccelerator, **own: Any) -> tuple[Any, nn.Module, Any, Count]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, count = kind(cpu=True, **own), Count()
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.register_for_checkpointing(count)
    accelerator.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    return accelerator, model, optimizer, count


def fill(number: int, model: nn.Module, optimizer: Any, count: Count) -> None:
    """Give everything that is saved the number of the save."""
    count.number = number
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(number)
            optimizer.state[weight]["exp_avg"].fill_(number)


def save_states(folder: Path, deadly: Callable[[], None] | None, began: Any) -> None:
    accelerator, model, optimizer, count = prepared(superpipe={"k": 2})
    for number in itertools.count():
        fill(number, model, optimizer, count)
        if number == 1 and deadly is not None:
            deadly()
        accelerator.save_state(folder)
        began.set()


def assert_one_save(folder: Path, kind: Any) -> int:
    accelerator, model, optimizer, count = prepared(kind)
    accelerator.load_state(folder)
    assert count.number >= 0
    for weight in model.parameters():
        assert torch.equal(weight, torch.full_like(weight, count.number))
        assert torch.equal(optimizer.state[weight]["exp_avg"], torch.full_like(weight, count.number))
    accelerator.free_memory()
    return count.number


@pytest.mark.parametrize("wait_ms", [0, 3, 7, 13, 19, 28, 41, 60])
def test_a_state_whose_save_is_killed_loads_as_it_was(wait_ms: int, tmp_path: Path) -> None:
    killed(save_states, tmp_path / "state", None, wait_ms=wait_ms)
    plain = assert_one_save(tmp_path / "state", Accelerator)
    assert assert_one_save(tmp_path / "state", SuperpipeAccelerator) == plain
    assert os.listdir(tmp_path) == ["state"], "what the kill left is cleared away"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(NUM_RENAMES))
def test_a_kill_between_the_renames_loses_nothing(number: int, after: bool, tmp_path: Path) -> None:
    """The old state until the new one is complete and about to take its place, then the new one."""
    killed(save_states, tmp_path / "state", partial(die_at_rename, number, after=after), wait_ms=None)
    is_replaced = (number, after) >= (1, True)
    assert assert_one_save(tmp_path / "state", SuperpipeAccelerator) == int(is_replaced)
    assert os.listdir(tmp_path) == ["state"]


# -- transformers


class Start(TrainerCallback):
    """Notes after how many steps the training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.step = state.global_step


def trainer(kind: Any, folder: Path, max_steps: int, **options: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    own = {"superpipe": {"k": 2}} if kind is SuperpipeTrainer else {}
    chosen = {"save_steps": 1, "save_total_limit": 2, "lr_scheduler_type": "constant", **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=NUM_STEPS, max_steps=max_steps,
        per_device_train_batch_size=2, learning_rate=1e-2, **chosen,
    )  # fmt: skip
    return kind(make_model(Story()), arguments, train_dataset=DATA, **own)


def train_for_ever(folder: Path, deadly: Callable[[], None] | None, began: Any) -> None:
    running = trainer(SuperpipeTrainer, folder, NUM_STEPS)
    save = running._save_checkpoint

    def saving(*arguments: Any) -> None:
        if running.state.global_step == 3:
            began.set()
            if deadly is not None:
                deadly()
        save(*arguments)

    running._save_checkpoint = saving
    running.train()


def assert_resumes(folder: Path, kind: Any) -> int:
    """Going on leaves the weights of a run that nobody killed; return after how many steps it went on."""
    steps = {int(each.name.split("-")[1]): each for each in folder.glob("checkpoint-*")}
    assert steps
    for step, checkpoint in steps.items():
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
        states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
        assert {int(state["step"]) for state in states} == {step}
    last = max(steps)
    resumed = trainer(kind, folder, last + 2)
    start = Start()
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=True)
    untouched = trainer(Trainer, folder / "untouched", last + 2, save_strategy="no")
    untouched.train()
    assert all(map(torch.equal, resumed.model.parameters(), untouched.model.parameters()))
    return start.step


@pytest.mark.parametrize(
    ("wait_ms", "kind"), [*zip((0, 5, 11, 18, 27, 45, 90, 140), itertools.cycle([Trainer, SuperpipeTrainer]))]
)
def test_a_run_killed_while_it_saves_resumes_exactly(wait_ms: int, kind: Any, tmp_path: Path) -> None:
    """Also with the untouched Trainer, which knows nothing of drafts."""
    killed(train_for_ever, tmp_path, None, wait_ms=wait_ms)
    assert_resumes(tmp_path, kind)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [0, 1, 2])  # complete, in its place, the oldest away
def test_a_run_killed_between_its_renames_resumes_exactly(number: int, after: bool, tmp_path: Path) -> None:
    killed(train_for_ever, tmp_path, partial(die_at_rename, number, after=after), wait_ms=None)
    assert assert_resumes(tmp_path, SuperpipeTrainer) == (2 if (number, after) == (0, False) else 3)
    assert not list(tmp_path.glob(".superpipe*"))
