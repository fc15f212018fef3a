"""What a plan costs, in closed form: the number of units copied to the device."""

from __future__ import annotations

from lightning_superpipe.errors import PlanError

__all__ = ["loads_forward", "loads_training", "loads_unchanged"]


def loads_training(n: int, k: int) -> int:
    """Return the loads of one training step over a chain of ``n`` units after an update: ``2n - min(k, n)``.

    The update made every copy on the device stale, so the forward loads all ``n``. Its last ``k`` stay through the
    turn, so the backward loads the others. ``k_prime`` does not matter, and no plan with ``k`` units needs fewer.

    >>> loads_training(24, k=2), loads_training(24, k=24), loads_training(24, k=99)
    (46, 24, 24)
    """
    _check(n, k)
    return 2 * n - min(k, n)


def loads_unchanged(n: int, k: int) -> int:
    """Return the loads of a training step whose weights did not change since the last: ``2n - 2 min(k, n)``.

    So it is while gradients accumulate and for frozen units: the first ``k``, where the last backward ended, are on the
    device already.

    >>> loads_unchanged(24, k=2), loads_unchanged(24, k=24)
    (44, 0)
    """
    _check(n, k)
    return 2 * n - 2 * min(k, n)


def loads_forward(n: int, k: int, k_prime: int = 1) -> int:
    """Return the loads of one of many forward-only passes, in the steady state, with ``forward_keep``.

    ``k - s`` units stay for good and ``m = n - k + s`` stream through ``s = min(k, k_prime + 1)`` slots, each loaded
    once a pass: ``n - k + 2`` for ``k_prime = 1`` and ``2 <= k < n``. If all fit, nothing is loaded after the first
    pass. With ``k_prime > 1`` a batch may straddle two passes; the number is the mean over passes. If fewer than
    ``k_prime`` units are off the device, batches are that small: ``n - k`` loads per ``k_prime`` streamed uses, rounded
    up.

    >>> loads_forward(24, k=6), loads_forward(24, k=1), loads_forward(24, k=24)
    (20, 24, 0)
    """
    _check(n, k)
    if not 1 <= k_prime <= k:
        raise PlanError(f"k_prime={k_prime} with k={k}: allowed is 1 <= k_prime <= k.")
    num_away = max(0, n - k)
    num_streamed = num_away + min(k, k_prime + 1)
    return -(-num_streamed * min(k_prime, num_away) // k_prime)


def _check(n: int, k: int) -> None:
    if n < 0 or k < 1:
        raise PlanError(f"n={n} units and k={k} on the device: allowed are n >= 0 and k >= 1.")
