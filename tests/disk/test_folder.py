"""The folder that files are in when nobody names one: what a killed run leaves there goes with the next start."""

from __future__ import annotations

import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lightning_superpipe.config import Disk
from lightning_superpipe.tiers import Folder
from tests.processes import CONTEXT


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("lightning_superpipe.tiers.folder._IN_MEMORY", ())
    return tmp_path


def hold(temporary: Path, wire: Connection) -> None:
    """Make a folder, tell where, and hold it until told to end."""
    tempfile.tempdir = str(temporary)
    folder = Folder(Disk())
    wire.send(folder.path)
    wire.recv()


def held(temporary: Path) -> tuple[Any, Connection, Path]:
    """A process that has a folder of its own."""
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(temporary, theirs))
    process.start()
    theirs.close()
    return process, mine, mine.recv()


def test_folder_of_a_killed_run_is_cleared_away_at_the_next_start(temporary: Path) -> None:
    process, _, left = held(temporary)
    process.kill()
    process.join()
    assert [path.name for path in left.iterdir()] == ["lock"]
    folder = Folder(Disk())
    assert [path for path in temporary.iterdir() if path.name.startswith("superpipe-")] == [folder.path]
    folder.close()
    assert not folder.path.exists()


def test_folder_of_a_run_that_is_alive_stays(temporary: Path) -> None:
    process, wire, path = held(temporary)
    Folder(Disk()).close()
    assert (path / "lock").exists()
    wire.send("end")
    process.join()
    assert process.exitcode == 0


def test_folder_that_holds_anything_else_stays(temporary: Path) -> None:
    for name, content in (("superpipe-theirs", "1\n"), ("superpipe-new", "")):
        (temporary / name).mkdir()
        (temporary / name / "lock").write_text(content)
    (temporary / "superpipe-theirs" / "notes.txt").write_text("mine")
    Folder(Disk()).close()
    assert (temporary / "superpipe-theirs" / "notes.txt").exists()
    assert (temporary / "superpipe-new" / "lock").exists(), "a run may have made it a moment ago"
