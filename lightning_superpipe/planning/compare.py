"""Whether a plan kept what was predicted of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from humanize import naturalsize

from lightning_superpipe.planning.prediction import Prediction

__all__ = ["missed"]

_TOLERANCE = 1.1  # steps may be so much slower or larger than predicted


def missed(
    step_s: Sequence[float], peak_bytes: int, prediction: Prediction, limit_bytes: int | None = None
) -> Iterator[str]:
    """Yield in what steps take more than predicted, with both numbers.

    A difference in time counts if it is also larger than the differences between the steps.

    Args:
        step_s: seconds of each step.
        peak_bytes: most on the device.
        limit_bytes: allowed there.

    >>> from lightning_superpipe.planning.prediction import PeakBytes, HostUse, LaneSeconds
    >>> told = Prediction(1.0, LaneSeconds(), (), 0.0, 0, 0, 0, PeakBytes(slots=1000), "F0", HostUse())
    >>> list(missed([1.25, 1.2, 1.22], 900, told)), list(missed([1.5, 1.2, 0.9], 900, told))
    (['a step takes 1220 ms, 1000 were predicted'], [])
    >>> list(missed([1.0], 1200, told)), list(missed([1.0], 1050, told, limit_bytes=1024))
    (['it takes 1.2 KiB on the device, 1000 Bytes were predicted'], ['it takes 1.0 KiB (1050 bytes) on the device, \
1024 are allowed'])
    """
    median_s, noise_s = statistics.median(step_s), max(step_s) - min(step_s)
    if median_s > _TOLERANCE * prediction.step_s and median_s - prediction.step_s > noise_s:
        yield f"a step takes {1e3 * median_s:.4g} ms, {1e3 * prediction.step_s:.4g} were predicted"
    if peak_bytes > _TOLERANCE * prediction.peak.total:
        yield f"it takes {_size(peak_bytes)} on the device, {_size(prediction.peak.total)} were predicted"
    elif limit_bytes is not None and peak_bytes > limit_bytes:
        yield f"it takes {_size(peak_bytes)} ({peak_bytes} bytes) on the device, {limit_bytes} are allowed"


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
