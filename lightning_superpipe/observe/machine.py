"""What a machine can do: how fast copies of each size are, and how fast the host updates weights. All measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from lightning_superpipe.errors import SuperpipeError

__all__ = ["CopyRate", "MachineProfile", "Route", "UpdateRate"]

_FORMAT = "lightning_superpipe.machine"
_FORMAT_VERSION = 1


class Route(str, Enum):
    """Which way bytes go."""

    H2D = "h2d"
    D2H = "d2h"
    BOTH = "both"  # as much each way, at once: a link may be no faster than one way alone


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
class MachineProfile:
    """What was measured on one machine.

    Attributes:
        device: such as ``"cuda:0"``.
        emulated: the device is the host itself, so that its copies cross no link.
        copies: by route, kind of memory and size.
        updates: by dtype and number of threads.
        versions: of the software that measured, by name.
    """

    device: str
    emulated: bool
    copies: tuple[CopyRate, ...]
    updates: tuple[UpdateRate, ...]
    versions: dict[str, str]

    def link_gb_s(self, route: Route, *, pinned: bool = True) -> float | None:
        """Return the best bandwidth of any size; None where it was not measured."""
        found = (copy.gb_s for copy in self.copies if copy.route is route and copy.pinned is pinned)
        return max(found, default=None)

    def update_rate(self, dtype: str, num_threads: int | None = None) -> float | None:
        """Return parameters per second with so many threads, or with the best number; None if not measured."""
        found = (
            update.parameters_per_s
            for update in self.updates
            if update.dtype == dtype and num_threads in (None, update.num_threads)
        )
        return max(found, default=None)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; ``load`` gives back an equal one."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> MachineProfile:
        """Read what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            SuperpipeError: the file holds something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, SuperpipeError) as error:
            raise SuperpipeError(
                f"{str(path)!r} is not a machine profile of this version ({error}). Load one that "
                "MachineProfile.save wrote, or measure again."
            ) from error

    @classmethod
    def from_dict(cls, state: Any) -> MachineProfile:
        """Read what ``to_dict`` returned.

        Raises:
            SuperpipeError: it is something else.
        """
        try:
            if (state["format"], state["version"]) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError("its format or version is another")
            values = {field.name: state[field.name] for field in fields(cls)}
            copies = (_sampled({**copy, "route": Route(copy["route"])}) for copy in values.pop("copies"))
            updates = (_sampled(update) for update in values.pop("updates"))
            return cls(
                copies=tuple(CopyRate(**copy) for copy in copies),
                updates=tuple(UpdateRate(**update) for update in updates),
                **values,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SuperpipeError(f"not a machine profile: {error!r}") from error


def _sampled(state: dict[str, Any]) -> dict[str, Any]:
    """Check that a rate has samples, all of them positive."""
    samples: Iterable[float] = state["seconds"]
    seconds = tuple(float(sample) for sample in samples)
    if not seconds or min(seconds) <= 0:
        raise ValueError(f"seconds={seconds}: at least one sample, all above 0")
    return {**state, "seconds": seconds}
