"""Which jobs are worth choosing: no other is both smaller and faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_superpipe.sweeps.row import Row

__all__ = ["baseline_of", "pareto_front", "varied_settings"]

_SHOWN = frozenset(("superpipe", "superpipe.k", "superpipe.k_prime"))  # they have columns of their own
_BESIDE = frozenset(("callbacks", "logger", "memory_cap"))  # named last: they change no loss


def pareto_front(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the rows that no other beats in peak device memory and step time at once, smallest first.

    Rows without both numbers are left out; of equal rows the first is kept.
    """
    measured = [(row.peak.total, row.step_ms, row) for row in rows if row.peak is not None and row.step_ms is not None]
    front: list[Row] = []
    fastest = float("inf")
    for _, step_ms, row in sorted(measured, key=lambda point: point[:2]):
        if step_ms < fastest:
            front.append(row)
            fastest = step_ms
    return tuple(front)


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the fastest finished job that asked for the same, but for streaming, on the same kind of machine."""
    same = [
        other
        for other in rows
        if other.is_finished
        and not other.is_streamed
        and other.machine == row.machine
        and _without_streaming(other) == _without_streaming(row)
    ]
    return min(same, key=lambda other: other.objective(), default=None)


def varied_settings(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return for each row (by fingerprint) the settings in which rows differ, apart from k and k'.

    What only streamed jobs have (``superpipe.*``) is compared among these.
    """
    flat = {row.fingerprint: dict(_flat(row.config)) for row in rows}
    streamed = [row.fingerprint for row in rows if row.is_streamed]
    names = sorted({name for settings in flat.values() for name in settings} - _SHOWN, key=_importance)
    varied: dict[str, dict[str, str]] = {row.fingerprint: {} for row in rows}
    for name in names:
        having = streamed if name.split(".")[0] == "superpipe" else list(flat)
        if len({flat[row].get(name) for row in having}) > 1:
            for row in having:
                varied[row][name] = flat[row].get(name, "(none)")
    return varied


def _importance(name: str) -> tuple[bool, str]:
    return name.split(".")[0] in _BESIDE, name


def _without_streaming(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.config.items() if name != "superpipe"}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield settings by their dotted names, values as text.

    >>> list(_flat({"trainer": {"max_steps": 3}, "seed": None}))
    [('trainer.max_steps', '3'), ('seed', 'null')]
    """
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "null" if value is None else str(value)
