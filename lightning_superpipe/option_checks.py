"""Checks of single options, and the words for those that fail them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from lightning_superpipe.errors import ConfigError

__all__ = ["check_count", "check_dtype", "is_number", "listed", "nearest", "parse_bytes"]

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown name: the nearest known one, or all of them.

    Args:
        prefix: of all names, as people write them.

    >>> nearest("kprime", ["k", "k_prime"]), nearest("h2d", ["h2d_gb_s"], prefix="link.")
    ("did you mean 'k_prime'?", "did you mean 'link.h2d_gb_s'?")
    >>> nearest("banana", ["k", "k_prime"])
    'known options: k, k_prime.'
    """
    near = difflib.get_close_matches(name, known, n=1) or [one for one in known if len(name) > 1 and name in one]
    return (
        f"did you mean {prefix + near[0]!r}?" if near else f"known options: {', '.join(prefix + one for one in known)}."
    )


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes; text may use decimal (GB) or binary (GiB) units.

    Raises:
        ConfigError: not a size, or negative.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 MB"), parse_bytes(512)
    (1610612736, 2000000, 512)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{size!r} is not a size in bytes: write an integer or text such as '8GiB' or '500MB'.")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def listed(names: Sequence[str]) -> str:
    """Return names in words.

    >>> listed(["a", "b", "c"])
    "'a', 'b' and 'c'"
    """
    return " and ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])]))


def check_dtype(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``value`` is None or one of the names."""
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ConfigError(f"{name}={value!r}: allowed are {listed(known)}, or null.")


def is_number(value: Any) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_count(name: str, value: Any, also: str | None = None, least: int = 1) -> None:
    """Raise ConfigError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"an integer of at least {least}" + (f" or {also}" if also else "")
        raise ConfigError(f"{name}={value!r}: {allowed} is allowed.")
