"""Writing and reading files: a failed save loses nothing and says what to do; nothing is held in memory twice."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_superpipe.adapters.lightning import SuperpipeCheckpointIO
from lightning_superpipe.errors import SuperpipeError
from tests.lightning.stories import WINDOW, Bench, Originals
from tests.parity.probe import ProbeModule
from tests.processes import run_code

pytestmark = pytest.mark.filterwarnings("ignore")

CONTENT = {"state_dict": {"weight": torch.arange(5.0)}, "epoch": 3}


def assert_holds_content(path: Path) -> None:
    held = torch.load(path, weights_only=True)
    assert held["epoch"] == 3 and torch.equal(held["state_dict"]["weight"], torch.arange(5.0))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.ckpt"
    plugin = SuperpipeCheckpointIO()
    plugin.save_checkpoint(CONTENT, path)
    assert_holds_content(path)
    read = plugin.load_checkpoint(path)
    assert read["epoch"] == 3 and torch.equal(read["state_dict"]["weight"], torch.arange(5.0))
    read["state_dict"]["weight"].add_(1)  # pages are the reader's own once written to
    assert_holds_content(path)
    plugin.save_checkpoint({"epoch": 4}, str(path))
    assert torch.equal(read["state_dict"]["weight"], torch.arange(5.0) + 1), "the file's old pages are still there"
    assert torch.load(path)["epoch"] == 4
    plugin.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_files_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    plugin, path = SuperpipeCheckpointIO(), tmp_path / "a.ckpt"
    (tmp_path / "b").write_text("")
    plugin.save_checkpoint(CONTENT, path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_paths_may_be_urls_of_files_or_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plugin = SuperpipeCheckpointIO()
    plugin.save_checkpoint(CONTENT, f"file://{tmp_path}/url.ckpt")
    plugin.save_checkpoint(CONTENT, "~/home.ckpt")
    assert_holds_content(tmp_path / "url.ckpt")
    assert_holds_content(tmp_path / "home.ckpt")
    assert plugin.load_checkpoint("~/home.ckpt")["epoch"] == 3


def test_remote_files_and_old_formats_are_left_to_lightning(tmp_path: Path) -> None:
    plugin = SuperpipeCheckpointIO()
    plugin.save_checkpoint(CONTENT, "memory://folder/a.ckpt")
    assert plugin.load_checkpoint("memory://folder/a.ckpt")["epoch"] == 3
    plugin.remove_checkpoint("memory://folder/a.ckpt")
    torch.save(CONTENT, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert plugin.load_checkpoint(tmp_path / "old.ckpt")["epoch"] == 3
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(CONTENT, tmp_path / "a.ckpt", storage_options={})


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("raised by the test while pickling")


def test_an_error_that_is_not_the_disks_is_passed_on(tmp_path: Path) -> None:
    plugin, path = SuperpipeCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint(CONTENT, path)
    with pytest.raises(ValueError, match="while pickling"):
        plugin.save_checkpoint({"thing": Unpicklable()}, path)
    assert_holds_content(path)
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "Allow writing in"),
        (errno.EROFS, "Allow writing in"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EIO, "Choose another folder"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_failed_save_keeps_the_old_file_and_says_what_to_do(
    code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, path = SuperpipeCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint(CONTENT, path)

    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SuperpipeError) as caught:
        plugin.save_checkpoint({"epoch": 9}, path)
    message = str(caught.value)
    assert str(path) in message and os.strerror(code) in message and advice in message and "untouched" in message
    assert "default_root_dir" in message and "dirpath" in message
    assert_holds_content(path)
    assert os.listdir(tmp_path) == ["a.ckpt"], "no draft is left behind"


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(SuperpipeError, match=r"taken/a\.ckpt.*choose another folder"):
        SuperpipeCheckpointIO().save_checkpoint(CONTENT, tmp_path / "taken" / "a.ckpt")
    (tmp_path / "folder.ckpt" / "inner").mkdir(parents=True)
    with pytest.raises(SuperpipeError, match=r"folder\.ckpt"):
        SuperpipeCheckpointIO().save_checkpoint(CONTENT, tmp_path / "folder.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["folder.ckpt", "taken"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(SuperpipeError, match=f"Allow writing in '{folder}'"):
        SuperpipeCheckpointIO().save_checkpoint(CONTENT, folder / "a.ckpt")


def test_a_trainer_that_cannot_write_keeps_the_trained_module(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    module = ProbeModule()
    originals = Originals(module)
    run = Bench("cpu", WINDOW).trainer(max_epochs=1)
    run.fit(module)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SuperpipeError, match="could not be written"):
        run.save_checkpoint(tmp_path / "taken" / "a.ckpt")
    originals.assert_kept()
    assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["epoch"] == 1


def test_a_fit_that_cannot_write_its_checkpoints_ends_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ProbeModule()
    originals = Originals(module)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    num_saves = 0

    def fails_second_time(*_: Any) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails_second_time)
    with pytest.raises(SuperpipeError, match="make room"):
        Bench("cpu", WINDOW).trainer(callbacks=[keep], enable_checkpointing=True).fit(module)
    originals.assert_kept()
    (path,) = tmp_path.iterdir()
    Bench("cpu", WINDOW).trainer(max_epochs=2).fit(module, ckpt_path=path)
    assert len(module.losses) == 4 + 6


DISK_FULL = """
import os, resource, sys
import torch
from lightning_superpipe.adapters.lightning import SuperpipeCheckpointIO
from lightning_superpipe.errors import SuperpipeError

plugin, path = SuperpipeCheckpointIO(), sys.argv[1]
plugin.save_checkpoint({"weight": torch.zeros(100)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for num_elements in (10**6, 60_000, 50_000, 49_500):  # it ends in the first tensor, or in the last bytes
    try:
        plugin.save_checkpoint({"weight": torch.zeros(num_elements), "other": torch.zeros(10)}, path)
    except SuperpipeError as error:
        print(error)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    assert torch.load(path)["weight"].numel() in (100, num_elements)
"""


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    ran = run_code(DISK_FULL, str(tmp_path / "a.ckpt"), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) >= 3
    assert all("a.ckpt" in line and "File too large" in line and "make room" in line for line in lines), lines


def test_loaded_optimizer_states_are_no_pages_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    first = Bench("cpu", WINDOW).trainer(max_epochs=1)
    first.fit(ProbeModule())
    first.save_checkpoint(path)

    class Truncates(ProbeModule):
        def on_train_start(self) -> None:
            os.truncate(path, 0)  # whoever still reads pages of the file dies of a bus error

    module = Truncates()
    Bench("cpu", WINDOW).trainer(max_epochs=2).fit(module, ckpt_path=path)
    assert len(module.losses) == 4
