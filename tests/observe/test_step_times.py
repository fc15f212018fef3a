"""Times from recorded spans, on spans that were written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.observe.disk_times import disk_seconds
from lightning_superpipe.observe.step_times import speeds_of
from lightning_superpipe.observe.trace import Lane, Span
from lightning_superpipe.planning import Curve


def curve(*copies: tuple[int, float]) -> Curve:
    return speeds_of([Span(Lane.H2D, "P", 0, 0.0, seconds, num_bytes) for num_bytes, seconds in copies]).h2d


@pytest.mark.parametrize("slowest", [4_000_000, 4_000_128, 4_000_256])
def test_copies_of_nearly_one_size_tell_a_rate_and_not_their_noise(slowest: int) -> None:
    sizes = (4_000_000, 4_000_128, 4_000_256)
    found = curve(*((size, 0.011 if size == slowest else 0.010) for size in sizes))
    seconds = [found.seconds(size) for size in (400_000, 4_000_000, 40_000_000)]
    assert seconds == pytest.approx([0.001, 0.010, 0.100], rel=0.11)


def test_copies_of_several_sizes_tell_latency_and_rate() -> None:
    found = curve(*((size, 0.001 + size * 1e-9) for size in (1_000_000, 4_000_000, 16_000_000)))
    assert [found.seconds(size) for size in (0, 2_000_000, 32_000_000)] == pytest.approx([0.001, 0.003, 0.033])


def test_a_larger_copy_never_seems_faster() -> None:
    found = curve((1_000_000, 0.004), (4_000_000, 0.003))
    assert found.seconds(4_000_000) == found.seconds(1_000_000) == 0.004


def test_what_was_never_copied_is_free() -> None:
    found = speeds_of([Span(Lane.H2D, "P", 0, 0.0, 0.004, 1_000_000)])
    assert found.d2h.seconds(1_000_000) == 0.0


# -- files


@st.composite
def requests(draw: st.DrawFn) -> list[Span]:
    """Reads and writes of whole seconds; each has a size of its own."""
    spans = []
    for index in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 12))
        lane = draw(st.sampled_from([Lane.READ, Lane.WRITE]))
        spans.append(Span(lane, "U", index, float(start), float(start + draw(st.integers(0, 8))), 1000 + index))
    return spans


@given(requests())
def test_requests_at_once_share_each_moment_of_the_disk(spans: list[Span]) -> None:
    own = dict.fromkeys((span.num_bytes for span in spans), 0.0)
    for second in range(20):
        under_way = [span for span in spans if span.start_s <= second < span.end_s]
        for span in under_way:
            own[span.num_bytes] += 1 / len(under_way)
    found = {size: seconds for by_size in disk_seconds(spans).values() for size, seconds in by_size.items()}
    assert found == pytest.approx(own)


def test_a_run_tells_its_disk_where_it_has_files_and_else_the_machine_does() -> None:
    read, write = Span(Lane.READ, "P", 0, 0.0, 0.002, 1_000_000), Span(Lane.WRITE, "U", 0, 0.002, 0.003, 1_000_000)
    machine = replace(speeds_of([]), disk_read=Curve.steady(1e6), disk_write=Curve.steady(1e6))
    assert speeds_of([]).disk_read is speeds_of([]).disk_write is None
    for known in (None, machine):
        found = speeds_of([read, write], known)
        assert found.disk_read is not None and found.disk_write is not None
        assert (found.disk_read.seconds(3_000_000), found.disk_write.seconds(3_000_000)) == pytest.approx(
            (0.006, 0.003)
        )
    reads_alone = speeds_of([read], machine)
    assert reads_alone.disk_read != machine.disk_read and reads_alone.disk_write == machine.disk_write
