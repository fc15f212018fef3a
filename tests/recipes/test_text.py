"""The standard library as text: whole files are held out, windows are the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.recipes.text import (
    FILE_END,
    HeldOutWindows,
    RandomWindows,
    is_held_out,
    read_standard_library,
)


def test_held_out_files_are_never_trained_on(tmp_path: Path) -> None:
    names = [f"package/module_{number}.py" for number in range(200)]
    for name in [*names, "test/left_out.py", "package/tests/left_out.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + "x = 1\n" * 2000)
    corpus = read_standard_library(tmp_path)
    train, held_out = (bytes(text.tolist()) for text in (corpus.train, corpus.held_out))
    assert 0 < corpus.num_held_out_files < 25
    assert corpus.num_train_files + corpus.num_held_out_files == len(names)
    for name in names:
        line = f"# {name}\n".encode()
        assert (line in held_out, line in train) == (is_held_out(name), not is_held_out(name))
    assert train.count(FILE_END) == corpus.num_train_files
    assert b"left_out" not in train + held_out


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuperpipeError, match="too little to learn from"):
        read_standard_library(tmp_path)


def test_windows_are_the_same_in_every_run_and_stay_inside_the_text() -> None:
    text = read_standard_library().held_out[:1000]
    windows = RandomWindows(text, 50, 33, seed=1)
    again = RandomWindows(text, 50, 33, seed=1)
    assert [window.tolist() for window in windows] == [window.tolist() for window in again]
    assert {len(window) for window in windows} == {33}
    spread = HeldOutWindows(text, 4, 33)
    assert spread[0].tolist() == text[:33].tolist()
    assert spread[3].tolist() == text[-33:].tolist()
