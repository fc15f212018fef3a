"""The words of the command line."""

from __future__ import annotations

import pytest

from lightning_superpipe.app.main import main
from lightning_superpipe.app.modes import MODES
from lightning_superpipe.app.words import help_text, overrides_of
from lightning_superpipe.errors import ConfigError


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_a_word_anywhere(mode: str) -> None:
    assert overrides_of([mode, "seed=1"]) == [f"mode={mode}", "seed=1"]
    assert overrides_of(["-m", "seed=1,2", mode]) == ["-m", "seed=1,2", f"mode={mode}"]


@pytest.mark.parametrize(
    "words",
    [
        ["--cfg", "job", "seed=1"],
        ["--config-dir", "plan", "~logger", "+trainer.benchmark=true"],
        ["--info", "searchpath"],
        ["--multirun", "superpipe.k=1,2"],
    ],
)
def test_what_hydra_knows_is_left_to_hydra(words: list[str]) -> None:
    assert overrides_of(words) == words


def test_a_word_that_is_no_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="'evla' is no mode: did you mean 'eval'"):
        overrides_of(["evla"])


def test_the_help_fits_a_screen_and_names_modes_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == help_text().strip()
    assert [word for word in [*MODES, "report", "low_memory", "adamw", "language_model"] if word not in shown] == []
    assert len(shown.splitlines()) < 60 and max(map(len, shown.splitlines())) <= 120


def test_a_report_needs_the_folder_of_a_sweep(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err.replace("\n", "")
