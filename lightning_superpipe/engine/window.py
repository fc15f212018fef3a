"""The window that an engine moves over a model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """How units move through slots, and how hostile the slots are (see the configuration).

    Attributes:
        num_resident: units that stay beside the ``k``, evenly spread.
        num_fetches: buffers for units on their way from files.
        in_memory: units that stay in host memory where the others lie in files.
    """

    k: int
    k_prime: int
    poison: bool = False
    slot_seed: int | None = None
    num_resident: int = 0
    num_fetches: int = 3
    in_memory: frozenset[int] = frozenset()
