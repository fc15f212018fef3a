"""A Trainer's checkpoints: the same files as the plain Trainer's under every option, pushed whole, resumed if whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lightning_superpipe import SuperpipeTrainer, SuperpipeTrainerMixin
from lightning_superpipe.errors import SuperpipeError, SuperpipeWarning
from tests.frontends.story import Story, make_model
from tests.frontends.test_transformers import DATA, arguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
UNSTEADY = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def make(kind: Any, folder: Path | str = "out", **options: Any) -> Any:
    own = {"superpipe": {"k": 2}} if issubclass(kind, SuperpipeTrainerMixin) else {}
    chosen = arguments(folder, **{"save_steps": 1, **options})
    return kind(make_model(Story()), chosen, train_dataset=DATA, eval_dataset=DATA[:2], **own)


def written(folder: Path) -> dict[str, Any]:
    """Names of all files, with what the states of the Trainer say."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        found[str(file.relative_to(folder))] = None
        if file.name == "trainer_state.json":
            state = json.loads(file.read_text())
            for entry in state["log_history"]:
                for name in UNSTEADY:
                    entry.pop(name, None)
            found[str(file.relative_to(folder))] = state
    return found


EVERY = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_total_limit": 2},
        {"save_total_limit": 1, "load_best_model_at_end": True, "greater_is_better": True, **EVERY},
        {"save_total_limit": 1, "load_best_model_at_end": True, "greater_is_better": False, **EVERY},
        {"save_total_limit": 2, "load_best_model_at_end": True, "greater_is_better": True, **EVERY},
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1},
        {"save_only_model": True, "save_total_limit": 3},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    ],
    ids=["all", "limit", "first is best", "last is best", "limit and best", "best", "model only", "epochs"],
)
def test_the_files_are_those_of_the_plain_trainer(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kind in (Trainer, SuperpipeTrainer):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        trainer = make(kind, **options)
        trainer.train()
        found.append((written(folder), trainer.state.best_model_checkpoint))
    assert found[0] == found[1]
    assert any("checkpoint" in name for name in found[0][0])


class Pushing(Trainer):
    """Notes what is pushed."""

    pushed: list[tuple[str, list[str]]]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.pushed.append((checkpoint_folder, sorted(os.listdir(checkpoint_folder))))


class StreamedPushing(SuperpipeTrainerMixin, Pushing):
    pass


def test_whole_checkpoints_are_pushed_from_their_place(tmp_path: Path) -> None:
    pushed = []
    for kind in (Pushing, StreamedPushing):
        trainer = make(kind, tmp_path, max_steps=2, save_total_limit=1)
        trainer.args.push_to_hub, trainer.pushed = True, []
        trainer.train()
        pushed.append(trainer.pushed)
    assert pushed[0] == pushed[1] and len(pushed[0]) == 2


def break_off(checkpoint: Path, how: str) -> None:
    """Leave a checkpoint as a kill of the plain Trainer does."""
    if how == "no state":
        (checkpoint / "trainer_state.json").unlink()
    elif how == "torn state":
        (checkpoint / "trainer_state.json").write_text('{"best_')
    else:
        (checkpoint / "checkpoint-is-incomplete.txt").write_text("in progress")


@pytest.mark.parametrize("how", ["no state", "torn state", "marked"])
def test_a_checkpoint_that_was_not_finished_is_not_resumed(how: str, tmp_path: Path) -> None:
    make(Trainer, tmp_path).train()
    break_off(tmp_path / "checkpoint-4", how)
    with pytest.warns(SuperpipeWarning, match=r"checkpoint-4\. Training resumes from checkpoint-3"):
        resumed = make(SuperpipeTrainer, tmp_path)
        resumed.train(resume_from_checkpoint=True)
    untouched = make(Trainer, tmp_path / "untouched")
    untouched.train()
    assert all(map(torch.equal, resumed.model.parameters(), untouched.model.parameters()))


def test_no_finished_checkpoint_at_all_is_refused(tmp_path: Path) -> None:
    make(Trainer, tmp_path, max_steps=1).train()
    break_off(tmp_path / "checkpoint-1", "no state")
    with pytest.raises(SuperpipeError, match=r"checkpoint-1\. There is no other"):
        make(SuperpipeTrainer, tmp_path).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make(SuperpipeTrainer, tmp_path).train(resume_from_checkpoint=True)


def test_a_failed_save_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(SuperpipeTrainer, tmp_path, max_steps=1).train()
    before = written(tmp_path)

    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SuperpipeError, match=r"checkpoint-1.*untouched.*save_only_model=True.*output_dir"):
        make(SuperpipeTrainer, tmp_path, max_steps=1).train()
    assert written(tmp_path) == before


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuses(self: Path, target: Any) -> Any:
        if Path(target).parent.name == "old":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.warns(SuperpipeWarning, match=r"checkpoint-1' could not be deleted.*by hand"):
        make(SuperpipeTrainer, tmp_path, max_steps=2, save_total_limit=1).train()
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_a_run_again_in_the_same_folder_keeps_notes_and_mixes_nothing(tmp_path: Path) -> None:
    make(SuperpipeTrainer, tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    make(SuperpipeTrainer, tmp_path, max_steps=1, save_only_model=True).train()
    names = set(os.listdir(tmp_path / "checkpoint-1"))
    assert {"notes.txt", "model.safetensors"} <= names and not names & {"optimizer.pt", "rng_state.pth"}


def test_weights_of_the_old_format_and_the_users_kernels(tmp_path: Path) -> None:
    options = {"fused_optimizer": True, "k": 2}
    chosen = arguments(tmp_path, save_steps=2, optim="adamw_torch")
    trainer = SuperpipeTrainer(make_model(Story()), chosen, train_dataset=DATA, superpipe=options)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")["param_groups"]
    assert [group["fused"] for group in saved] == [None] * len(saved)
    assert trainer.optimizer.param_groups[0]["fused"] is True
    resumed = SuperpipeTrainer(make_model(Story()), chosen, train_dataset=DATA, superpipe=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.optimizer.param_groups[0]["fused"] is True
    assert all(map(torch.equal, resumed.model.parameters(), trainer.model.parameters()))
