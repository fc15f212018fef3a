"""Profiles are kept, found again, and never trusted when they should not be."""

from __future__ import annotations

import json
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_superpipe.errors import ConfigError, SuperpipeWarning
from lightning_superpipe.forecast.machine import machine_profile
from lightning_superpipe.observe import MachineProfile, Route, find_profile, identify, keep_profile, shipped_names
from lightning_superpipe.observe.profiles import CACHE_VARIABLE, cached_profile
from tests.observe.test_machine import PROFILE

HERE = identify(torch.device("cpu"))
MINE = replace(PROFILE, identity=HERE)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kept_profile_is_found_again_and_another_machine_finds_none(tmp_path: Path) -> None:
    path = keep_profile(MINE, tmp_path / "new" / "folder")
    assert path is not None and files(path.parent) == [path.name]
    assert cached_profile(HERE, path.parent) == MINE
    assert cached_profile(replace(HERE, device="another"), path.parent) is None
    assert cached_profile(HERE, tmp_path / "nowhere") is None


def test_the_variable_names_the_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    path = keep_profile(MINE)
    assert path is not None and path.parent == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = keep_profile(MINE)
    assert path is not None and path.parent == tmp_path / "lightning_superpipe"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "lightning_superpipe.machine", "version": 1}', "\x00\xff"])
def test_a_corrupt_profile_is_said_and_put_aside_whole(content: str, tmp_path: Path) -> None:
    path = keep_profile(MINE, tmp_path)
    assert path is not None
    for number in (1, 2):
        path.write_text(content)
        with pytest.warns(SuperpipeWarning, match=rf"not a machine profile.*corrupt-{number}\.json"):
            assert cached_profile(HERE, tmp_path) is None
        aside = path.with_name(f"{path.stem}.corrupt-{number}.json")
        assert (aside.read_text(), path.exists()) == (content, False)


@pytest.mark.parametrize(("name", "value"), [("torch", "1.0"), ("driver", "1.2.3")])
def test_a_stale_profile_is_said_with_what_has_changed(name: str, value: str, tmp_path: Path) -> None:
    keep_profile(replace(MINE, identity=replace(HERE, **{name: value})), tmp_path)
    with pytest.warns(SuperpipeWarning, match=rf"no longer holds: {name} is .*, was '{value}'"):
        assert cached_profile(HERE, tmp_path) is None


def test_a_stale_profile_is_refused_where_it_was_named(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    replace(MINE, identity=replace(HERE, torch="1.0")).save(path)
    with pytest.raises(ConfigError, match=r"old\.json.*was '1\.0'.*superpipe profile --again"):
        find_profile(str(path), HERE)
    assert find_profile(str(path)).identity.torch == "1.0", "of another machine it may be"


def test_a_folder_that_cannot_be_written_is_a_warning_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(SuperpipeWarning, match=f"cannot be kept.*{CACHE_VARIABLE}"):
        assert keep_profile(MINE, tmp_path / "file" / "folder") is None


def test_measuring_keeps_and_the_next_call_measures_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", SuperpipeWarning)
        first = machine_profile("cpu", folder=tmp_path, say=said.append)
        assert said and first.use_s > 0 and first.launch_s > 0
        said.clear()
        assert machine_profile("cpu", folder=tmp_path, say=said.append) == first
    assert said == []
    (only,) = tmp_path.iterdir()
    only.write_text("{")
    with pytest.warns(SuperpipeWarning, match="not a machine profile"):
        again = machine_profile("cpu", folder=tmp_path, say=said.append)
    assert said and again.identity == first.identity and MachineProfile.load(only) == again
    assert stat.S_ISREG(only.stat().st_mode) and len(files(tmp_path)) == 2


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_profile_says_where_it_is_from_and_has_all_that_a_plan_needs(name: str) -> None:
    profile = find_profile(name)
    assert profile.note and profile.sources
    assert profile.emulated or all(source.startswith("https://") for source in profile.sources)
    assert profile.room.device_total > 1 << 30
    speeds = profile.speeds()
    assert 0 < speeds.h2d.seconds(1 << 20) < speeds.h2d.seconds(1 << 30) < 1
    compute, memory = profile.compute_curve("bfloat16"), profile.memory_curve()
    assert compute is not None and memory is not None
    assert 0 < compute.seconds(10**9) < compute.seconds(10**12)
    assert profile.copy_curve(Route.BOTH) is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [("rtx409024g", "did you mean 'rtx4090-24g'"), ("banana", "cpu-2cores, rtx4090-24g"), ("x.json", "No such file")],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_profile(name)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps({"format": "lightning_superpipe.row"}))
    with pytest.raises(ConfigError, match=r"row\.json.*not a machine profile"):
        find_profile(str(tmp_path / "row.json"))
