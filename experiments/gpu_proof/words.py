"""Numbers as tables show them; what is not known is a dash."""

from __future__ import annotations

from humanize import naturalsize

from experiments.gpu_proof.job import Outcome

__all__ = ["UNKNOWN", "losses", "ratio", "share_saved", "size", "step_ms", "throughput"]

UNKNOWN = "-"


def size(num_bytes: float | None) -> str:
    """Return bytes in binary units.

    >>> size(1536), size(None)
    ('1.50 KiB', '-')
    """
    return UNKNOWN if num_bytes is None else naturalsize(num_bytes, binary=True, format="%.2f")


def throughput(outcome: Outcome) -> str:
    """Return tokens per second."""
    rate = outcome.tokens_per_s
    return UNKNOWN if rate is None else f"{rate:,.0f}"


def step_ms(outcome: Outcome) -> str:
    """Return the mean time of a step in milliseconds."""
    seconds = outcome.report.get("step_seconds")
    return f"{1e3 * sum(seconds) / len(seconds):,.1f}" if seconds else UNKNOWN


def losses(outcome: Outcome) -> str:
    """Return the first and the last loss: whoever does not train is seen."""
    values = outcome.report.get("losses")
    return f"{values[0]:.4f} to {values[-1]:.4f}" if values else UNKNOWN


def ratio(value: float | None, reference: float | None) -> str:
    """Return a value as a multiple of another.

    >>> ratio(3.0, 2.0), ratio(None, 2.0)
    ('1.50 x', '-')
    """
    return f"{value / reference:.2f} x" if value is not None and reference else UNKNOWN


def share_saved(value: float | None, reference: float | None) -> str:
    """Return how much less than a reference a value is.

    >>> share_saved(1.0, 4.0), share_saved(5.0, 4.0)
    ('75.0 %', '-25.0 %')
    """
    return f"{1 - value / reference:.1%}".replace("%", " %") if value is not None and reference else UNKNOWN
