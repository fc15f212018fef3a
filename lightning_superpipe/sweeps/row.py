"""What one job of a sweep found, as data that is written to a file and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from lightning_superpipe.observe.report import PeakBytes, Report

__all__ = ["JobResult", "Row", "Status"]

_FORMAT = "lightning_superpipe.row"
_FORMAT_VERSION = 1


class Status(str, Enum):
    """How a job ended."""

    FINISHED = "finished"  # it has numbers; it is not run again
    REFUSED = "refused"  # the setting is impossible (k' > k) or does not fit a budget: an error of this package
    FAILED = "failed"  # anything else was raised


@dataclass(frozen=True)
class JobResult:
    """What a job hands over when it ends well.

    Attributes:
        loss: training loss of the last step.
        step_ms: median time of a training step after warm-up, milliseconds.
        metrics: other numbers by name, such as ``{"val_accuracy": 0.97}``.
        report: of the strategy; None where nothing was streamed (``superpipe=off``).
        num_parameters: of the model.
        predicted_peak_bytes: device bytes known before the first step (slots, anchors, gradients on their way home;
            activations come on top); None if unknown.
        device: such as ``"cuda:0"``, for jobs without a report.
    """

    loss: float
    step_ms: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    report: Report | None = None
    num_parameters: int | None = None
    predicted_peak_bytes: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Row:
    """One job: what was asked, where it ran, how it ended, and its numbers.

    Attributes:
        fingerprint: of config and versions; a job is known by it, and its file is named after it.
        status: how it ended.
        config: everything that was asked, as plain values.
        versions: of the software, by name.
        machine: system, processor, cores, memory, accelerator, by name.
        seconds: that the whole job took.
        device: where it computed, such as ``"cuda:0"``; None if it did not get that far.
        emulated: the link or the device memory was emulated; such numbers never stand beside measured ones.
        k: most units on the device at once, as it ran, or as asked where nothing ran; None without streaming.
        k_prime: units moved per transfer, likewise.
        num_units: units of the model.
        num_steps: training steps.
        loss: training loss of the last step.
        step_ms: median time of a training step after warm-up.
        metrics: other numbers by name.
        num_parameters: of the model.
        peak: device bytes by kind at the peak.
        predicted_peak_bytes: device bytes known before the first step, without activations.
        resident_bytes: what the ordinary run would hold on the device at least.
        host_bytes: bytes of the store.
        num_loads: units copied to the device in the last step.
        num_plan_misses: loads on demand, in total.
        h2d_bytes: bytes copied from host to device in the last step.
        d2h_bytes: bytes copied from device to host in the last step.
        stall_ms: time that compute waited for copies, mean of all steps.
        error: why the job did not finish: a sentence where it was refused, a traceback where it failed.
    """

    fingerprint: str
    status: Status
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    seconds: float
    device: str | None = None
    emulated: bool = False
    k: int | str | None = None
    k_prime: int | str | None = None
    num_units: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    step_ms: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    num_parameters: int | None = None
    peak: PeakBytes | None = None
    predicted_peak_bytes: int | None = None
    resident_bytes: int | None = None
    host_bytes: int | None = None
    num_loads: int | None = None
    num_plan_misses: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    stall_ms: float | None = None
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the job has numbers."""
        return self.status is Status.FINISHED

    @property
    def is_streamed(self) -> bool:
        """Whether the job streamed, or was meant to; the others are the baseline."""
        return self.k is not None

    @property
    def window(self) -> tuple[int, int]:
        """K and k_prime as numbers, 0 where a job left them open and nothing ran."""
        return self.k if isinstance(self.k, int) else 0, self.k_prime if isinstance(self.k_prime, int) else 0

    @property
    def peak_device_bytes(self) -> int | None:
        """Most bytes on the device at once, all kinds; None if unknown."""
        return None if self.peak is None else self.peak.total

    def objective(self, memory_cap_bytes: int | None = None) -> float:
        """Return what a search makes small: the step time in ms, infinite for jobs without one.

        Args:
            memory_cap_bytes: a job above it counts as infinitely slow; so does one whose peak is unknown.
        """
        if self.step_ms is None or not self.is_finished:
            return math.inf
        if memory_cap_bytes is not None and (self.peak is None or self.peak.total > memory_cap_bytes):
            return math.inf
        return self.step_ms

    def to_json(self) -> str:
        """Return the row as text; ``from_json`` gives back an equal one."""
        state = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        state["peak"] = None if self.peak is None else self.peak._asdict()
        return json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION, **state}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError, KeyError, TypeError: the text holds something else.
        """
        state: dict[str, Any] = json.loads(text)
        if (state.pop("format"), state.pop("version")) != (_FORMAT, _FORMAT_VERSION):
            raise ValueError("its format or version is another")
        state["status"] = Status(state["status"])
        state["peak"] = None if state["peak"] is None else PeakBytes(**state["peak"])
        return cls(**state)
