"""What a run's own first steps say of its units: times, bytes and copy rates, as data that predictions start from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.meter import Boundary
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

__all__ = ["TransientBytes", "UnitProfile", "transient_bytes"]

_FORMAT = "lightning_superpipe.unit_profile"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class UnitProfile:
    """What was measured of one run, under one setting.

    Attributes:
        workload: units in order of execution, with what each takes.
        speeds: of the run's own copies.
        setting: under which it ran.
        indices: of the workload's units, in the order of registration.
        step_s: of each step, from its beginning to the next one's, seconds; the first steps are not among them. Without
            training of each pass.
        peak: device bytes by kind at the peak of a step.
        device: such as ``"cuda:0"``.
        emulated: the link or the device memory was emulated.
        num_passes: forwards of the model in one step without training, such as a ``generate``; the workload is one.
    """

    workload: Workload
    speeds: Speeds
    setting: Setting
    indices: tuple[int, ...]
    step_s: tuple[float, ...]
    peak: PeakBytes
    device: str
    emulated: bool
    num_passes: int = 1

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; ``load`` gives back an equal one."""
        state = {"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> UnitProfile:
        """Read what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            SuperpipeError: the file holds something else.
        """
        try:
            return cls.parse(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, SuperpipeError) as error:
            raise SuperpipeError(
                f"{str(path)!r} is not a unit profile of this version ({error!r}). Load one that UnitProfile.save "
                "wrote, or run again."
            ) from error

    @classmethod
    def parse(cls, state: dict[str, Any]) -> UnitProfile:
        """Return the profile that was saved as this.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, SuperpipeError: it is something else.
        """
        if (state["format"], state["version"]) != (_FORMAT, _FORMAT_VERSION):
            raise ValueError("its format or version is another")
        return cls._from_dict({field.name: state[field.name] for field in fields(cls) if field.name in state})

    @classmethod
    def _from_dict(cls, state: dict[str, Any]) -> UnitProfile:
        work = dict(state.pop("workload"))
        units = tuple(UnitWork(**{**unit, "policies": tuple(unit["policies"])}) for unit in work.pop("units"))
        # Older files have none of these.
        batch_bytes, in_files = (tuple(work.pop(name, ())) for name in ("batch_bytes", "in_files"))
        setting = state.pop("setting")
        return cls(
            workload=Workload(units=units, batch_bytes=batch_bytes, in_files=in_files, **work),
            speeds=Speeds(**{name: _read(value) for name, value in state.pop("speeds").items()}),
            setting=Setting(**{**setting, "activations": tuple(setting["activations"])}),
            indices=tuple(state.pop("indices")),
            step_s=tuple(state.pop("step_s")),
            peak=PeakBytes(*state.pop("peak")),
            **state,
        )


def _read(value: Any) -> Any:
    """A curve, a number or nothing."""
    return Curve(tuple((size, seconds) for size, seconds in value["points"])) if isinstance(value, dict) else value


class TransientBytes(NamedTuple):
    """What compute takes on the device beside what is held from forward to backward.

    Attributes:
        forward: by unit.
        backward: by unit, beside all that its own forward saved.
        turn: between the last forward and the first backward.
        unfreed: as ``backward``, if nothing of that was let go meanwhile.
    """

    forward: dict[int, int]
    backward: dict[int, int]
    turn: int
    unfreed: dict[int, int]


def transient_bytes(
    trail: Iterable[Boundary], order: Sequence[int], held: Sequence[int], whole: Sequence[int]
) -> TransientBytes:
    """Return what the compute of one step took at its peaks.

    Args:
        trail: the looks at memory of that step.
        order: units by their first forward.
        held: bytes that each of these holds until its backward, under the policy that was in force.
        whole: bytes that each of these would hold if all was kept.

    >>> trail = [Boundary("F", 0, 12, 10), Boundary("F", 1, 25, 20), Boundary("turn", -1, 24, 20)]
    >>> trail += [Boundary("B", 1, 26, 10, 28), Boundary("B", 0, 15, 0, 15)]
    >>> transient_bytes(trail, [0, 1], [10, 10], [10, 10])
    TransientBytes(forward={0: 12, 1: 15}, backward={0: 5, 1: 6}, turn=4, unfreed={0: 5, 1: 8})
    """
    below = dict(zip(order, accumulate(held, initial=0), strict=False))  # held by the units before
    size = dict(zip(order, whole, strict=True))
    forward, backward, unfreed = (dict.fromkeys(order, 0) for _ in range(3))
    turn = unnamed = 0
    for look in trail:
        peak, unnamed = max(look.peak_bytes, unnamed), 0
        if not look.name:
            unnamed = peak
        elif look.name == "turn":
            turn = max(turn, peak - sum(held))
        elif look.name == "F" and look.unit in forward:
            forward[look.unit] = max(forward[look.unit], peak - below[look.unit])
        elif look.name == "B" and look.unit in backward:
            held_there = below[look.unit] + size[look.unit]
            backward[look.unit] = max(backward[look.unit], peak - held_there)
            unfreed[look.unit] = max(unfreed[look.unit], peak - held_there, look.unfreed_bytes - held_there)
    return TransientBytes(forward, backward, turn, unfreed)
