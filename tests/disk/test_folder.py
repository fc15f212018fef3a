"""The folder that files are in when nobody names one: what a killed run leaves there goes with the next start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_superpipe.config import Disk
from lightning_superpipe.tiers import Folder

HOLD = "from lightning_superpipe.tiers import Folder; from lightning_superpipe.config import Disk; import sys; "
HOLD += "folder = Folder(Disk()); print(folder.path, flush=True); sys.stdin.read()"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("lightning_superpipe.tiers.folder._IN_MEMORY", ())
    return tmp_path


def held() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder of its own."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_of_a_killed_run_is_cleared_away_at_the_next_start(temporary: Path) -> None:
    process, left = held()
    process.kill()
    process.communicate()
    assert [path.name for path in left.iterdir()] == ["lock"]
    folder = Folder(Disk())
    assert [path for path in temporary.iterdir() if path.name.startswith("superpipe-")] == [folder.path]
    folder.close()
    assert not folder.path.exists()


def test_folder_of_a_run_that_is_alive_stays(temporary: Path) -> None:
    process, path = held()
    Folder(Disk()).close()
    assert (path / "lock").exists()
    process.communicate("")
    assert process.returncode == 0


def test_folder_that_holds_anything_else_stays(temporary: Path) -> None:
    for name, content in (("superpipe-theirs", "1\n"), ("superpipe-new", "")):
        (temporary / name).mkdir()
        (temporary / name / "lock").write_text(content)
    (temporary / "superpipe-theirs" / "notes.txt").write_text("mine")
    Folder(Disk()).close()
    assert (temporary / "superpipe-theirs" / "notes.txt").exists()
    assert (temporary / "superpipe-new" / "lock").exists(), "a run may have made it a moment ago"
