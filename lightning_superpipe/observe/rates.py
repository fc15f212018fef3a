"""Single figures of a machine: how long one kind of work took, with every sample that was taken."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lightning_superpipe.planning.workload import Curve

__all__ = ["ComputeRate", "CopyRate", "DiskRate", "DiskRoute", "MemoryRate", "Route", "UpdateRate", "Work", "curve_of"]


class Route(str, Enum):
    """Which way bytes go."""

    H2D = "h2d"
    D2H = "d2h"
    BOTH = "both"  # as much each way, at once: a link may be no faster than one way alone


class DiskRoute(str, Enum):
    """Which way bytes go between a file and host memory."""

    READ = "read"
    WRITE = "write"


class Work(str, Enum):
    """What an operation on single elements does with them: on a processor that is no accelerator it matters."""

    PLAIN = "plain"  # hardly more than reading and writing
    FUNCTION = "function"  # exponentials and the like
    RANDOM = "random"  # draws


@dataclass(frozen=True)
class CopyRate:
    """How long copies of one size took.

    Attributes:
        route: which way.
        pinned: from and to page-locked host memory.
        num_bytes: of one copy; with ``Route.BOTH`` each way.
        seconds: of each sample, for one copy (with ``Route.BOTH`` until both were over).

    >>> CopyRate(Route.H2D, True, 10**9, (0.02, 0.04, 0.05)).gb_s
    25.0
    """

    route: Route
    pinned: bool
    num_bytes: int
    seconds: tuple[float, ...]

    @property
    def gb_s(self) -> float:
        """Median bandwidth in 10^9 bytes per second; with ``Route.BOTH`` of both ways together."""
        moved = self.num_bytes * (2 if self.route is Route.BOTH else 1)
        return moved / statistics.median(self.seconds) / 1e9

    @property
    def amount(self) -> int:
        """What the curve of such rates runs over: bytes, with ``Route.BOTH`` each way."""
        return self.num_bytes


@dataclass(frozen=True)
class UpdateRate:
    """How long torch's fused AdamW took on the host.

    Attributes:
        num_threads: of torch's kernels.
        num_parameters: updated in one step.
        dtype: of weights, gradients and states, such as ``"bfloat16"``.
        seconds: of each step.
    """

    num_threads: int
    num_parameters: int
    dtype: str
    seconds: tuple[float, ...]

    @property
    def parameters_per_s(self) -> float:
        """Median rate, parameters per second."""
        return self.num_parameters / statistics.median(self.seconds)


@dataclass(frozen=True)
class ComputeRate:
    """How long the product of two square matrices took on the device.

    Attributes:
        dtype: of both, such as ``"bfloat16"``.
        num_flops: twice the multiplications.
        seconds: of each sample, for one product.

    >>> ComputeRate("float32", 2 * 1000**3, (0.002,)).tflop_s
    1.0
    """

    dtype: str
    num_flops: int
    seconds: tuple[float, ...]

    @property
    def tflop_s(self) -> float:
        """Median rate, 10^12 operations per second."""
        return self.num_flops / statistics.median(self.seconds) / 1e12

    @property
    def amount(self) -> int:
        """What the curve of such rates runs over: operations."""
        return self.num_flops


class _OfBytes:
    """What rates of bytes share."""

    num_bytes: int
    seconds: tuple[float, ...]

    @property
    def gb_s(self) -> float:
        """Median bandwidth, all ``num_bytes`` together, 10^9 bytes per second."""
        return self.num_bytes / statistics.median(self.seconds) / 1e9

    @property
    def amount(self) -> int:
        """What the curve of such rates runs over: bytes."""
        return self.num_bytes


@dataclass(frozen=True)
class MemoryRate(_OfBytes):
    """How long an operation on single elements took on the device.

    Attributes:
        num_bytes: read and written together.
        seconds: of each sample, for one operation.
        work: what it does.
    """

    num_bytes: int
    seconds: tuple[float, ...]
    work: Work = Work.PLAIN


@dataclass(frozen=True)
class DiskRate(_OfBytes):
    """How long one read or write of a file took.

    Attributes:
        route: which way.
        direct: past the page cache; otherwise the cache may have answered reads.
        num_bytes: of the file.
        seconds: of each sample; of a write until the disk has it.
    """

    route: DiskRoute
    direct: bool
    num_bytes: int
    seconds: tuple[float, ...]


class _Rate(Protocol):
    @property
    def amount(self) -> int: ...
    @property
    def seconds(self) -> tuple[float, ...]: ...


def curve_of(rates: Sequence[_Rate]) -> Curve | None:
    """Return the curve through the medians; None without rates.

    Where a larger amount took less time, noise decided: the curve stays level there. One amount alone gives a fixed
    rate, since nothing is known of the cost that even the smallest amount has.

    >>> curve_of([MemoryRate(100, (2.0,)), MemoryRate(200, (1.0,)), MemoryRate(400, (4.0,))]).points
    ((100, 2.0), (200, 2.0), (400, 4.0))
    >>> curve_of([MemoryRate(100, (2.0,))]).seconds(50)
    1.0
    """
    by_amount: dict[int, float] = {}
    for rate in rates:
        by_amount[rate.amount] = statistics.median(rate.seconds)
    if len(by_amount) == 1:
        ((amount, seconds),) = by_amount.items()
        return Curve.steady(amount / seconds)
    points: list[tuple[int, float]] = []
    for amount, seconds in sorted(by_amount.items()):
        points.append((amount, max(seconds, points[-1][1] if points else 0.0)))
    return Curve(tuple(points)) if points else None
