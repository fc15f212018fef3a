"""Every front end tells the same story with streaming and without, and leaves the same numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frontends.cases import CASES
from tests.frontends.story import OPTIONS, STORIES, Ending


def tell(case: str, story: str, folder: Path, streamed: bool | tuple[bool, bool]) -> Ending:
    folder.mkdir()
    return CASES[case](STORIES[story], folder, streamed)


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("case", CASES)
def test_front_end_leaves_the_numbers_of_the_ordinary_run(case: str, story: str, tmp_path: Path) -> None:
    ordinary = tell(case, story, tmp_path / "ordinary", False)
    streamed = tell(case, story, tmp_path / "streamed", True)
    assert ordinary.losses
    assert streamed.equals(ordinary)


@pytest.mark.parametrize("streamed", [(True, False), (False, True)], ids=["from streamed", "to streamed"])
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_go_from_either_kind_of_run_to_the_other(
    case: str, streamed: tuple[bool, bool], tmp_path: Path
) -> None:
    ordinary = tell(case, "resumed", tmp_path / "ordinary", False)
    assert tell(case, "resumed", tmp_path / "mixed", streamed).equals(ordinary)


@pytest.mark.parametrize("case", CASES)
def test_stories_differ(case: str, tmp_path: Path) -> None:
    """Or the parity above would compare runs in which nothing happens."""
    endings = [tell(case, name, tmp_path / name, False) for name in ("plain", "bf16")]
    assert not endings[0].equals(endings[1])


@pytest.mark.parametrize("streamed", [True, (False, True)], ids=["throughout", "from ordinary"])
@pytest.mark.parametrize("case", CASES)
def test_front_end_resumes_with_files_to_the_numbers_of_the_ordinary_run(
    case: str, streamed: bool | tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = tell(case, "resumed", tmp_path / "ordinary", False)
    monkeypatch.setitem(OPTIONS, "store", "disk")
    assert tell(case, "resumed", tmp_path / "files", streamed).equals(ordinary)
