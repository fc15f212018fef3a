from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.sweeps import SweepReport, print_report, record_job
from lightning_superpipe.sweeps.files import read_rows, replacing
from tests.sweeps.made_up import config, result, sweep


@pytest.mark.parametrize("read", [read_rows, print_report, SweepReport.of])
def test_a_missing_folder_is_answered_with_what_to_name(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(SuperpipeError, match=r"not there.*hydra\.sweep\.dir"):
        read(tmp_path / "nothing")


def test_an_empty_or_foreign_folder_is_answered_with_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(SuperpipeError, match="no rows of a sweep"):
        read_rows(tmp_path)
    (tmp_path / "notes.txt").write_text("of another program")
    with pytest.raises(SuperpipeError, match="no rows of a sweep"):
        read_rows(tmp_path)
    with pytest.raises(SuperpipeError, match="is a file"):
        read_rows(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format": "other", "version": 1}', '{"format": "lightning_superpipe.row"}']
)
def test_a_corrupt_row_is_named_and_the_others_are_read(text: str, tmp_path: Path) -> None:
    row = record_job(tmp_path, config(2), lambda: result(2), is_sweep=True)
    bad = tmp_path / "rows" / "bad.json"
    bad.write_text(text)
    found = read_rows(tmp_path)
    assert found.good == (row,)
    assert [corrupt.path for corrupt in found.corrupt] == [bad]
    assert str(bad) in str(SweepReport.of(tmp_path)).replace("\n", "")


def test_a_row_of_another_version_is_named(tmp_path: Path) -> None:
    record_job(tmp_path, config(2), lambda: result(2), is_sweep=True)
    (path,) = (tmp_path / "rows").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    assert "another" in read_rows(tmp_path).corrupt[0].reason


def test_rows_stand_in_the_order_of_their_windows(tmp_path: Path) -> None:
    sweep(tmp_path, ks=(8, 1, 2), k_primes=(2, 1))
    order = [(row.k, row.k_prime) for row in read_rows(tmp_path).good]
    assert order == [(None, None), (1, 1), (1, 2), (2, 1), (2, 2), (8, 1), (8, 2)]


def test_a_draft_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text("old")
    with pytest.raises(SuperpipeError, match=r"File too large.*not repeated"), replacing(path) as draft:
        draft.write_text("half of the new")
        raise OSError(27, "File too large")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("row.json", "old")]


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let the operating system refuse to write more than so many bytes to a file, in the middle of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["row", "picture"])
def test_a_disk_that_fills_gives_a_clear_error_and_leaves_what_was_there(what: str, tmp_path: Path) -> None:
    rows = sweep(tmp_path, ks=(1, 2))
    report = SweepReport.of(tmp_path)
    report.draw(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(600), pytest.raises(SuperpipeError, match=r"File too large.*Everything written before is intact"):
        if what == "row":
            record_job(tmp_path, config(3), lambda: result(3), is_sweep=True)
        else:
            report.draw(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(before) == len(rows) + 2
    assert record_job(tmp_path, config(3), lambda: result(3), is_sweep=True).is_finished
