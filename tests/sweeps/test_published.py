"""The published sweep says what its page claims."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from lightning_superpipe.sweeps.files import read_rows

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "20_sweep" / "results"
ROWS = read_rows(FOLDER).good
WINDOWS = [(k, k_prime) for k in (1, 2, 4, 8, 14) for k_prime in (1, 2, 4) if k_prime <= k]


def test_every_window_and_the_ordinary_run_are_there() -> None:
    assert read_rows(FOLDER).corrupt == ()
    assert [(row.k, row.k_prime) for row in ROWS if row.is_finished and row.is_streamed] == WINDOWS
    assert sum(not row.is_streamed for row in ROWS) == 1
    assert all(row.emulated for row in ROWS if row.is_finished and row.is_streamed)


def test_losses_and_metrics_are_equal_in_every_job() -> None:
    numbers = {(row.loss, *sorted(row.metrics.items())) for row in ROWS if row.is_finished}
    assert len(numbers) == 1


def test_peaks_grow_with_k_and_stay_in_the_budget() -> None:
    peaks = {(row.k, row.k_prime): row.peak.total for row in ROWS if row.peak is not None}
    by_k = [[peaks[window] for window in WINDOWS if window[0] == k] for k in (1, 2, 4, 8, 14)]
    assert all(max(smaller) < min(larger) for smaller, larger in pairwise(by_k))
    assert max(peaks.values()) < 20 * 2**20
