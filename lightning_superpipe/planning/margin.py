"""The room that a plan leaves above the activations that were measured: later batches may be larger."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["activation_margin"]

_ACCURACY = 0.03  # to which bytes are predicted (experiments/21_prediction)
_LEAST = 0.1  # where batches differ, or may: in length and in content
_FEWEST_STEPS = 3  # fewer that are alike do not show that all are


def activation_margin(batch_bytes: Sequence[int]) -> float:
    """Return how much more activations may take than in the step whose memory was counted, relative.

    Where all steps were given as much, that is what bytes are predicted to. Where they differ, a later batch may be
    larger by as much as the largest of them is above the smallest, and by no less than where nothing is known.

    Args:
        batch_bytes: what units were given in each step, first in the one that was counted.

    >>> activation_margin([80, 80, 80, 80]), activation_margin([80, 100, 60]), activation_margin([80])
    (0.03, 0.5, 0.1)
    """
    if len(batch_bytes) < _FEWEST_STEPS:
        return _LEAST
    spread = (max(batch_bytes) - min(batch_bytes)) / max(batch_bytes[0], 1)
    return max(_LEAST, spread) if spread else _ACCURACY
