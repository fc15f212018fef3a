"""What a simulated step takes, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_superpipe.planning.disk_work import DiskWork

__all__ = ["HostUse", "LaneSeconds", "PeakBytes", "Prediction"]


class PeakBytes(NamedTuple):
    """Device bytes by kind at the moment when their sum is largest, so that they add up to the peak.

    Attributes:
        slots: of units.
        anchors: permanent copies, and what updates on the device keep there.
        gradients: of the unit that computes, and those on their way home.
        activations: all else that forward and backward hold.

    >>> max(PeakBytes(4, 1, 0, 9), PeakBytes(4, 1, 3, 7), key=lambda peak: peak.total).gradients
    3
    """

    slots: int = 0
    anchors: int = 0
    gradients: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All kinds together, bytes."""
        return sum(self)


class HostUse(NamedTuple):
    """Host bytes by kind that a step needs.

    Attributes:
        weights: of units and anchors.
        gradients: of all trained units.
        states: of the optimizer.
        activations: that were offloaded, or buffers on their way to files.
        staging: other buffers, casts, and copies to undo a step with.
    """

    weights: int = 0
    gradients: int = 0
    states: int = 0
    activations: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """All kinds together, bytes."""
        return sum(self)


class LaneSeconds(NamedTuple):
    """What each lane works in one step, in seconds; copies as if nothing disturbed them.

    Attributes:
        compute: of the device, and what the engine and the loop take between: all that is done one after the other.
        h2d: copies to the device.
        d2h: copies home.
        host: updates.
        disk: reads and writes.
    """

    compute: float = 0.0
    h2d: float = 0.0
    d2h: float = 0.0
    host: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """One step in the steady state.

    Attributes:
        step_s: from one step's begin to the next one's, seconds.
        busy: what each lane works.
        stalls_s: for each unit, how long compute waits for its weights, its activations, or room for its gradients.
        end_stall_s: how long it waits, once backward has computed, for the last gradients, and for the update where
            nothing hides it.
        num_loads: units copied to the device; of many passes without training, the mean.
        h2d_bytes: copied to the device in a step.
        d2h_bytes: copied home.
        peak: device bytes when their sum is largest.
        peak_at: the use during which that is, such as ``"B11"``, or ``"turn"``.
        host: bytes in host memory.
        disk: bytes read from files and written there in a step.
    """

    step_s: float
    busy: LaneSeconds
    stalls_s: tuple[float, ...]
    end_stall_s: float
    num_loads: float
    h2d_bytes: int
    d2h_bytes: int
    peak: PeakBytes
    peak_at: str
    host: HostUse
    disk: DiskWork = field(default_factory=DiskWork)

    @property
    def bound_s(self) -> float:
        """No step can take less: the seconds of the busiest lane."""
        return max(self.busy)

    @property
    def busiest(self) -> str:
        """The name of that lane."""
        return max(self.busy._asdict().items(), key=lambda lane: lane[1])[0]

    @property
    def stall_s(self) -> float:
        """All waiting of one step, seconds."""
        return sum(self.stalls_s) + self.end_stall_s
