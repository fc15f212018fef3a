"""``save_state`` and ``load_state``: Accelerate's files and names, hooks, limits, and what a failed save leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import nn

from lightning_superpipe import SuperpipeAccelerator
from lightning_superpipe.errors import ConfigError, SuperpipeError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_accelerate")]
WIDTH = 8


def prepared(kind: Any = SuperpipeAccelerator, **options: Any) -> tuple[Any, nn.Module, Any]:
    """An accelerator, its model and its optimizer, after one step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = kind(cpu=True, **options)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.backward(model(torch.randn(2, WIDTH)).sum())
    optimizer.step()
    return accelerator, model, optimizer


def numbers(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    states = [optimizer.state[weight]["exp_avg"] for weight in model.parameters()]
    return [value.detach().clone() for value in (*model.parameters(), *states)]


def loads(folder: Path | None, expected: list[torch.Tensor], kind: Any = Accelerator, **options: Any) -> bool:
    accelerator, model, optimizer = prepared(kind, **options)
    accelerator.load_state(folder)
    return all(map(torch.equal, numbers(model, optimizer), expected))


def automatic(folder: Path, **options: Any) -> ProjectConfiguration:
    return ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, **options)


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_automatic_names_and_limits_are_accelerates(limit: int | None, tmp_path: Path) -> None:
    kept = []
    for kind in (Accelerator, SuperpipeAccelerator):
        folder = tmp_path / kind.__name__
        accelerator, model, optimizer = prepared(kind, project_config=automatic(folder, total_limit=limit))
        for _ in range(4):
            accelerator.save_state()
        kept.append(sorted(str(each.relative_to(folder)) for each in folder.rglob("*")))
    assert kept[0] == kept[1] and any("checkpoint_3" in each for each in kept[0])
    assert loads(None, numbers(model, optimizer), project_config=automatic(folder))
    assert loads(None, numbers(model, optimizer), SuperpipeAccelerator, project_config=automatic(folder))


def test_the_only_checkpoint_goes_after_the_next_is_there(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared(project_config=automatic(tmp_path, total_limit=1))
    accelerator.save_state()
    before = numbers(model, optimizer)
    handle = accelerator.register_save_state_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("of the test")))
    with pytest.raises(ValueError, match="of the test"):
        accelerator.save_state()
    handle.remove()
    assert loads(None, before, project_config=automatic(tmp_path))


def test_a_number_that_exists_is_refused_with_the_next_free_one(tmp_path: Path) -> None:
    accelerator, *_ = prepared(project_config=automatic(tmp_path))
    accelerator.save_state()
    accelerator.save_state()
    again, *_ = prepared(project_config=automatic(tmp_path))
    with pytest.raises(ConfigError, match=r"checkpoint_0.*iteration = 2"):
        again.save_state()
    again.project_configuration.iteration = 2
    assert Path(again.save_state()) == tmp_path / "checkpoints" / "checkpoint_2"


def test_what_the_user_keeps_in_the_folder_stays_and_old_states_go(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "config.yaml").symlink_to("notes/a.txt")
    for name in ("optimizer_1.bin", "custom_checkpoint_0.pkl", "model_7.safetensors"):
        (folder / name).write_text("of a run with more objects")
    accelerator, model, optimizer = prepared()
    assert accelerator.save_state(folder) == folder
    assert (folder / "notes" / "a.txt").read_text() == (folder / "config.yaml").read_text() == "mine"
    names = {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "config.yaml", "notes"}
    assert set(os.listdir(folder)) == names and os.listdir(tmp_path) == ["state"]
    accelerator.save_state(folder, safe_serialization=False)
    assert set(os.listdir(folder)) == names - {"model.safetensors"} | {"pytorch_model.bin"}
    assert loads(folder, numbers(model, optimizer)) and loads(folder, numbers(model, optimizer), SuperpipeAccelerator)


def test_hooks_write_into_what_becomes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(models: Any, weights: Any, output_dir: str) -> None:
        Path(output_dir, "adapter").mkdir()
        Path(output_dir, "adapter", "weights.txt").write_text(str(len(seen)))
        seen.append(Path(output_dir).name)

    seen: list[str] = []
    accelerator, *_ = prepared()
    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(lambda models, input_dir: seen.append(input_dir))
    monkeypatch.chdir(tmp_path)
    accelerator.save_state("step-1")
    accelerator.save_state("step-1")
    assert Path("step-1", "adapter", "weights.txt").read_text() == "1"
    accelerator.load_state("step-1")
    assert seen == ["step-1"] * 3


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    accelerator, model, optimizer = prepared()
    accelerator.save_state(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and loads(tmp_path / "disk" / "real", numbers(model, optimizer))


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "make room, save less"), (errno.EACCES, "Allow writing in"), (errno.EIO, "Cho")]
)
def test_a_failed_save_keeps_the_old_state_and_says_what_to_do(
    code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model, optimizer = prepared()
    accelerator.save_state(tmp_path / "state")
    before = numbers(model, optimizer)
    optimizer.step()

    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(SuperpipeError) as caught:
        patch.setattr(os, "fsync", fails)
        accelerator.save_state(tmp_path / "state")
    assert all(part in str(caught.value) for part in (advice, os.strerror(code), "untouched", "save_state(output_dir)"))
    assert os.listdir(tmp_path) == ["state"] and loads(tmp_path / "state", before)


def test_a_state_is_read_while_the_next_one_is_saved(tmp_path: Path) -> None:
    """What is being written is not taken for what a kill left."""
    accelerator, model, optimizer = prepared()
    accelerator.save_state(tmp_path / "state")
    before, found = numbers(model, optimizer), []
    optimizer.step()
    hook = lambda *_: found.append(loads(tmp_path / "state", before, SuperpipeAccelerator))  # noqa: E731
    accelerator.register_save_state_pre_hook(hook)
    accelerator.save_state(tmp_path / "state")
    assert found == [True] and loads(tmp_path / "state", numbers(model, optimizer))
    assert os.listdir(tmp_path) == ["state"]


def test_the_root_of_a_disk_is_refused() -> None:
    accelerator, *_ = prepared()
    with pytest.raises(SuperpipeError, match=r"'/' is the root of a disk.*a folder in it"):
        accelerator.save_state("/")


def test_loaded_states_do_not_hang_on_their_file(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)
    expected, file = numbers(model, optimizer), tmp_path / "optimizer.bin"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(map(torch.equal, numbers(model, optimizer), expected))


def test_files_of_the_old_format_load(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    accelerator.save_state(tmp_path)
    file = tmp_path / "optimizer.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert loads(tmp_path, numbers(model, optimizer), SuperpipeAccelerator)


def test_files_hold_the_users_choice_of_kernels(tmp_path: Path) -> None:
    accelerator, _, optimizer = prepared(superpipe={"fused_optimizer": True})
    assert optimizer.param_groups[0]["fused"] is True
    accelerator.save_state(tmp_path)
    assert torch.load(tmp_path / "optimizer.bin")["param_groups"][0]["fused"] is None
    accelerator.load_state(tmp_path)
    assert optimizer.param_groups[0]["fused"] is True
