"""What a machine can do: how fast copies of each size are, and how fast the host updates weights. All measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.identity import Identity, Room
from lightning_superpipe.observe.rates import (
    ComputeRate,
    CopyRate,
    DiskRate,
    DiskRoute,
    MemoryRate,
    Route,
    UpdateRate,
    Work,
    curve_of,
)
from lightning_superpipe.planning.workload import Curve, Speeds

__all__ = ["MachineProfile"]

_FORMAT = "lightning_superpipe.machine"
_FORMAT_VERSION = 2
_HALVES = ("bfloat16", "float16")
_ADAMW_WORDS = 7  # read: weight, gradient, two states; written: weight, two states


@dataclass(frozen=True)
class MachineProfile:
    """What was measured on one machine.

    Attributes:
        device: such as ``"cuda:0"``.
        emulated: the device is the host itself, so that its copies cross no link.
        copies: by route, kind of memory and size.
        updates: by dtype and number of threads.
        versions: of the software that measured, by name.
        computes: matrix products on the device, by dtype and size.
        memory: operations on single elements on the device, by size and by what they do.
        disks: files of a folder that was asked for, by size.
        room: memory of the machine, total and free when it was measured.
        identity: which machine this is.
        launch_s: least that any operation takes, with autograd around it, seconds.
        use_s: what the engine itself takes for each use of a unit, seconds.
        why_not_pinned: why page-locked memory could not be had; empty where it was, or nobody tried.
        note: who measured, if not this package on this machine.
        sources: addresses of published measurements that the figures come from.
    """

    device: str
    emulated: bool
    copies: tuple[CopyRate, ...]
    updates: tuple[UpdateRate, ...]
    versions: dict[str, str]
    computes: tuple[ComputeRate, ...] = ()
    memory: tuple[MemoryRate, ...] = ()
    disks: tuple[DiskRate, ...] = ()
    room: Room = field(default_factory=Room)
    identity: Identity = field(default_factory=Identity)
    launch_s: float = 0.0
    use_s: float = 0.0
    why_not_pinned: str = ""
    note: str = ""
    sources: tuple[str, ...] = ()

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

    def copy_curve(self, route: Route, *, pinned: bool = True) -> Curve | None:
        """Return the curve of copies; that of pageable memory where the pinned one was not measured."""
        mine = [copy for copy in self.copies if copy.route is route]
        return curve_of([copy for copy in mine if copy.pinned is pinned] or [copy for copy in mine if not copy.pinned])

    def compute_curve(self, dtype: str) -> Curve | None:
        """Return seconds of a matrix product by its operations.

        Half precisions answer for each other, and float32, which is slower, for what was not measured at all.
        """
        for candidate in (dtype, *(_HALVES if dtype in _HALVES else ()), "float32"):
            found = curve_of([rate for rate in self.computes if rate.dtype == candidate])
            if found is not None:
                return found
        return None

    def memory_curve(self, work: Work = Work.PLAIN) -> Curve | None:
        """Return seconds of an operation on single elements by the bytes that it reads and writes.

        The plain ones, which are the fastest, answer for what was not measured.
        """
        mine = [rate for rate in self.memory if rate.work is work]
        return curve_of(mine or [rate for rate in self.memory if rate.work is Work.PLAIN])

    def update_seconds(self, dtype: str, num_parameters: int, *, num_states: int = 2) -> float | None:
        """Return how long the host takes to update so many parameters; None if it was not measured.

        Updates run at the speed of memory, so an optimizer with other states than AdamW's two takes as much longer or
        shorter as it moves more or fewer bytes.
        """
        rate = self.update_rate(dtype) or self.update_rate("float32")
        return None if rate is None else num_parameters / rate * (3 + 2 * num_states) / _ADAMW_WORDS

    def speeds(self, *, pinned: bool = True) -> Speeds:
        """Return what the simulation of a plan asks of a machine.

        Args:
            pinned: copies from page-locked memory; pageable memory answers where there was none.

        Raises:
            SuperpipeError: copies were not measured each way.
        """
        h2d, d2h = (self.copy_curve(route, pinned=pinned) for route in (Route.H2D, Route.D2H))
        if h2d is None or d2h is None:
            raise SuperpipeError(
                f"the profile of {self.device!r} has no copies {'to' if h2d is None else 'from'} the device: measure "
                "the machine again (superpipe profile --again)."
            )
        read, write = (curve_of([disk for disk in self.disks if disk.route is way]) for way in DiskRoute)
        both = self.copy_curve(Route.BOTH, pinned=pinned)
        return Speeds(h2d=h2d, d2h=d2h, both=both, use_s=self.use_s, disk_read=read, disk_write=write)

    def why_stale(self, here: Identity) -> str:
        """Return why the profile is not one of a machine as it is now, in words; empty if it is."""
        return self.identity.differences(here)

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
        return cls.read(Path(path))

    @classmethod
    def read(cls, source: Path | Traversable) -> MachineProfile:
        """Read what ``save`` wrote, also from inside a package; errors are those of ``load``."""
        try:
            return cls.from_dict(json.loads(source.read_text(encoding="utf-8")))
        except (ValueError, SuperpipeError) as error:
            raise SuperpipeError(
                f"{str(source)!r} is not a machine profile of this version ({error}). Load one that "
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
            values = {each.name: state[each.name] for each in fields(cls)}
            for name, kind in _RATES.items():
                values[name] = tuple(kind(**_sampled(rate)) for rate in values[name])
            values |= {"room": Room(**values["room"]), "identity": Identity(**values["identity"])}
            return cls(**values | {"sources": tuple(values["sources"])})
        except (ValueError, KeyError, TypeError) as error:
            raise SuperpipeError(f"not a machine profile: {error!r}") from error


_RATES: dict[str, type] = {
    "copies": CopyRate,
    "updates": UpdateRate,
    "computes": ComputeRate,
    "memory": MemoryRate,
    "disks": DiskRate,
}


def _sampled(state: dict[str, Any]) -> dict[str, Any]:
    """Check that a rate has samples, all of them positive, and of something."""
    samples: Iterable[float] = state["seconds"]
    seconds = tuple(float(sample) for sample in samples)
    if not seconds or min(seconds) <= 0:
        raise ValueError(f"seconds={seconds}: at least one sample, all above 0")
    amounts = {name: value for name, value in state.items() if name.startswith("num_")}
    if any(not isinstance(value, int) or value < 1 for value in amounts.values()):
        raise ValueError(f"{amounts}: all are whole and above 0")
    names = {"route": Route if "pinned" in state else DiskRoute, "work": Work}
    return {**state, "seconds": seconds, **{name: kind(state[name]) for name, kind in names.items() if name in state}}
