"""Measures a step, and chooses once how many units are updated on the device."""

from __future__ import annotations

from statistics import fmean

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.observe.trace import Lane, Recorder, Recording, Span
from lightning_superpipe.optimizer.device import DeviceUpdates
from lightning_superpipe.planning.update_share import UpdateCosts, choose_share

__all__ = ["ShareChoice"]

_MOST_STEPS = 64  # gradients may be accumulated over many; with no update until then, nothing is chosen


class ShareChoice:
    """Records steps until one holds updates by the host, and sets the share that the cost model finds.

    Args:
        first: number of the first step to record.
    """

    def __init__(self, engine: Engine, device: DeviceUpdates, first: int) -> None:
        self._engine, self._device, self._first = engine, device, first
        self._num_steps = 0
        self.is_over = False

    def begin_step(self, number: int, spare_bytes: int | None) -> None:
        """A training step begins.

        Args:
            spare_bytes: of the device, which updates there may take; None for no limit.
        """
        lanes = self._engine.lanes
        if self.is_over or number < self._first:
            return
        if self._num_steps == 0:
            lanes.start_recording()
        elif (recorder := lanes.recorder) is not None and (recorder.has_updates or self._num_steps == _MOST_STEPS):
            self.is_over = True
            self._choose(_finished(lanes.stop_recording()), spare_bytes)
        self._num_steps += 1

    def _choose(self, recording: Recording, spare_bytes: int | None) -> None:
        fits = spare_bytes is None or self._device.need_bytes <= spare_bytes
        costs = costs_of(recording, len(self._engine.units), self._device.scratch_bytes)
        if fits and costs is not None:
            self._device.use_share(choose_share(costs))


def costs_of(recording: Recording, num_units: int, scratch_bytes: int) -> UpdateCosts | None:
    """What was measured of one step, as the cost model takes it; None where something was not seen.

    Args:
        num_units: units that are updated; the recording may miss the updates of some.
        scratch_bytes: of one unit: weights, gradients and states.
    """
    updates = [span for span in recording.lane(Lane.HOST) if span.name == "U"]
    loads = [span for span in recording.lane(Lane.H2D) if span.name == "P"]
    returns = [span for span in recording.lane(Lane.D2H) if span.name == "G"]
    if not updates or not loads or not returns or not all(span.seconds for span in (*loads, *returns)):
        return None
    weight_bytes = fmean(span.num_bytes for span in loads)
    gradient_bytes = max(span.num_bytes for span in returns)
    return UpdateCosts(
        num_units=num_units,
        compute_s=recording.busy_seconds(Lane.COMPUTE),
        host_update_s=fmean(span.seconds for span in updates),
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        state_bytes=max(0.0, scratch_bytes - weight_bytes - gradient_bytes),
        h2d_bytes=sum(span.num_bytes for span in recording.lane(Lane.H2D)),
        d2h_bytes=sum(span.num_bytes for span in recording.lane(Lane.D2H)),
        h2d_bytes_s=_rate(loads),
        d2h_bytes_s=_rate(returns),
    )


def _rate(spans: list[Span]) -> float:
    return sum(span.num_bytes for span in spans) / sum(span.seconds for span in spans)


def _finished(recorder: Recorder) -> Recording:
    return recorder.finish(unit_names=(), k=1, k_prime=1, device="", emulated=True, resident_bytes=0, versions={})
