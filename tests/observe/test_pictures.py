from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from lightning_superpipe.errors import SuperpipeError, UnsupportedError
from lightning_superpipe.observe import Lane, Recording, Span, draw_memory, draw_timeline
from tests.observe.simulated import MIB, Machine, simulate_step

Draw = Callable[..., None]

DRAWINGS: list[Draw] = [draw_timeline, draw_memory]
NO_WAIT = Machine(load_s=0.001)


def texts(path: Path) -> Counter[str]:
    """Every line of text in a picture, with how often it stands there."""
    return Counter((node.text or "").strip() for node in ElementTree.parse(path).iter() if node.tag.endswith("}text"))


def height_of(path: Path, text: str) -> float:
    """Where the one line with this text stands, in points from the top."""
    (node,) = (node for node in ElementTree.parse(path).iter() if node.tag.endswith("}text") and node.text == text)
    moved = re.search(r"translate\([-\d.]+ ([-\d.]+)\)", node.get("transform") or "")
    return float(moved.group(1) if moved else node.get("y") or "nan")


def num_hatched(path: Path) -> int:
    return path.read_text().count('style="fill: url(#')


def settings() -> dict[str, object]:
    """The matplotlib settings of the caller; reading "backend" would choose one."""
    return {name: value for name, value in dict(matplotlib.rcParams.copy()).items() if name != "backend"}


@pytest.fixture
def svg(tmp_path: Path) -> Path:
    return tmp_path / "picture.svg"


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize(("dark", "background"), [(False, "#ffffff"), (True, "#0d1117")])
def test_a_picture_is_well_formed_and_as_wide_as_a_readme(draw: Draw, dark: bool, background: str, svg: Path) -> None:
    draw(simulate_step(), svg, dark)
    root = ElementTree.parse(svg).getroot()
    assert root.get("width") == "675pt"  # 900 pixels of CSS
    assert background in svg.read_text()


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("emulated", [True, False])
def test_the_title_says_when_numbers_are_emulated(draw: Draw, emulated: bool, svg: Path) -> None:
    draw(simulate_step(emulated=emulated), svg)
    assert any("(emulated link and memory)" in text for text in texts(svg)) is emulated


@pytest.mark.parametrize("draw", DRAWINGS)
def test_equal_recordings_give_equal_files(draw: Draw, tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(simulate_step(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_the_callers_style_neither_matters_nor_changes(draw: Draw, tmp_path: Path) -> None:
    draw(simulate_step(), tmp_path / "one.svg")
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": True, "svg.fonttype": "path"}):
        before = settings()
        draw(simulate_step(), tmp_path / "two.svg")
        assert settings() == before
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_the_ending_of_the_path_chooses_the_format(draw: Draw, tmp_path: Path) -> None:
    draw(simulate_step(), str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_missing_matplotlib_is_answered_with_the_extra(
    draw: Draw, svg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"lightning_superpipe\[plots\]"):
        draw(simulate_step(), svg)
    assert not svg.exists()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_an_empty_recording_is_refused(draw: Draw, svg: Path) -> None:
    with pytest.raises(SuperpipeError, match="record_step"):
        draw(replace(simulate_step(), spans=(), samples=()), svg)


def test_each_bar_carries_the_index_of_its_unit(svg: Path) -> None:
    recording = simulate_step(num_units=5, k=2)
    draw_timeline(recording, svg)
    shown, work = texts(svg), Counter(span.unit for span in recording.spans if not span.is_stall)
    assert {unit: shown[str(unit)] for unit in (1, 2, 3)} == {unit: work[unit] for unit in (1, 2, 3)}
    assert work[1] == 6  # two loads, forward, backward, gradient, update


def test_indices_that_do_not_fit_are_left_out(svg: Path) -> None:
    draw_timeline(simulate_step(num_units=150), svg)
    assert not {str(unit) for unit in range(101, 149)} & set(texts(svg))


def test_exactly_the_stalls_are_hatched(svg: Path) -> None:
    waiting, flowing = simulate_step(num_units=6, k=2), simulate_step(num_units=6, k=2, machine=NO_WAIT)
    num_stalls = [sum(span.is_stall for span in recording.spans) for recording in (waiting, flowing)]
    in_key = 1
    assert num_stalls[0] > num_stalls[1] == 1  # only the first unit is waited for
    for recording, stalls in zip((waiting, flowing), num_stalls, strict=True):
        draw_timeline(recording, svg)
        assert num_hatched(svg) == stalls + in_key


def test_the_timeline_names_lanes_and_how_busy_they_were(svg: Path) -> None:
    recording = simulate_step()
    draw_timeline(recording, svg)
    shown = texts(svg)
    assert {"compute", "h2d", "d2h", "host", "forward", "backward"} <= set(shown)
    assert f"busy {recording.busy_seconds(Lane.COMPUTE) / recording.duration_s:.0%}" in shown
    assert any(f"compute waits {recording.stall_seconds * 1e3:.1f} of" in text for text in shown)
    assert any(text.endswith(" ms") for text in shown)


def test_forward_and_backward_of_a_unit_look_different(svg: Path) -> None:
    def styles(name: str) -> str:
        recording = simulate_step(num_units=2, k=2)
        draw_timeline(replace(recording, spans=(Span(Lane.COMPUTE, name, 0, 0.0, 1.0),)), svg)
        return svg.read_text()

    assert styles("F").replace(">forward<", "><") != styles("B").replace(">backward<", "><")


@pytest.mark.parametrize(("start_s", "share"), [(0.0, True), (0.25, True), (0.5, False)])
def test_spans_at_the_same_time_share_the_height_of_their_lane(start_s: float, share: bool, svg: Path) -> None:
    spans = tuple(Span(Lane.H2D, "P", unit, start, start + 0.5) for unit, start in ((1, 0.0), (2, start_s)))
    draw_timeline(replace(simulate_step(num_units=4, k=2), spans=spans), svg)
    one, two = (height_of(svg, text) for text in ("1", "2"))
    assert (abs(one - two) > 9) is share  # points


def memory_step(**options: Any) -> Recording:
    return simulate_step(num_units=12, k=3, **options)


def test_memory_lists_each_kind_with_its_bytes_at_the_peak(svg: Path) -> None:
    recording = memory_step()
    draw_memory(recording, svg)
    peak = recording.peak
    assert peak is not None
    shown = texts(svg)
    assert {"slots", "anchors", "gradients", "activations", "peak"} <= set(shown)
    for size in (peak.slots, peak.anchors, peak.activations, peak.total):
        assert f"{size / MIB:.1f} MiB" in shown


def test_the_budget_is_dashed_and_absent_without_one(svg: Path) -> None:
    draw_memory(memory_step(budget_bytes=130 * MIB), svg)
    assert "budget: 130.0 MiB" in texts(svg)
    assert "stroke-dasharray" in svg.read_text()
    draw_memory(memory_step(), svg)
    assert "stroke-dasharray" not in svg.read_text()
    assert not any("budget" in text for text in texts(svg))


@pytest.mark.parametrize(("factor", "leaves"), [(1.5, False), (8, True)])
def test_an_ordinary_run_far_above_leaves_the_chart_with_its_bytes(factor: float, leaves: bool, svg: Path) -> None:
    peak = memory_step().peak
    assert peak is not None
    size = int(factor * peak.total)
    draw_memory(memory_step(resident_bytes=size), svg)
    name = f"ordinary run: at least {size / MIB:.1f} MiB"
    expected = f"{name}, {factor:.1f} times this peak" if leaves else name
    assert expected in texts(svg)


def test_a_far_reference_does_not_flatten_the_areas(svg: Path) -> None:
    draw_memory(memory_step(resident_bytes=10_000 * MIB, budget_bytes=20_000 * MIB), svg)
    assert "100 MiB" in texts(svg)  # the last tick stays near the peak of 118 MiB
    assert "budget: 19.5 GiB, 169.5 times this peak" in texts(svg)


def test_lines_close_together_keep_their_labels_apart(svg: Path) -> None:
    draw_memory(memory_step(resident_bytes=150 * MIB, budget_bytes=148 * MIB), svg)
    budget, ordinary = height_of(svg, "budget: 148.0 MiB"), height_of(svg, "ordinary run: at least 150.0 MiB")
    assert abs(budget - ordinary) > 9  # points
