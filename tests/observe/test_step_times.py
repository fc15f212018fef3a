"""Times from recorded spans, on spans that were written down by hand."""

from __future__ import annotations

import pytest

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
