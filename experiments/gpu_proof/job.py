"""What one process is asked to do, and what became of it: plain data that travels and is written down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from experiments.gpu_proof.sizes import SIZES, Size

__all__ = ["CannotRun", "Job", "Outcome", "Status"]


class CannotRun(Exception):
    """A contender cannot run here; the message says why."""


class Status(str, Enum):
    """How a process ended."""

    OK = "ok"
    MISSING = "missing"  # a package is not installed
    REFUSED = "refused"  # it cannot run here, or said no before it ran
    NO_MEMORY = "out of memory"
    FAILED = "failed"
    LATE = "out of time"


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        task: name of a function in ``tasks``: ``train``, ``infer``, ``trace``, ``profile`` or ``facts``.
        size: name in ``SIZES``.
        device: ``cuda``, ``cpu``, or ``emu`` (the tests' emulated device, whose bytes are counted and can be capped).
        peer: name of a file in ``peers``, for ``train`` and ``infer``.
        checkpointing: recompute each block's activations in backward.
        k, k_prime: the window, for superpipe.
        num_blocks: instead of the size's.
        batch_size: instead of the size's.
        num_steps: instead of the size's.
        cap_bytes: device memory that the process may use; None for all there is.
        seed: of weights and tokens.
        folder: where files go, for ``trace``.
    """

    task: str
    size: str
    device: str
    peer: str = ""
    checkpointing: bool = False
    k: int | None = None
    k_prime: int = 1
    num_blocks: int | None = None
    batch_size: int | None = None
    num_steps: int | None = None
    cap_bytes: int | None = None
    seed: int = 0
    folder: str = ""

    @property
    def scale(self) -> Size:
        """The size, with what this job has instead."""
        size = SIZES[self.size]
        instead = {name: getattr(self, name) for name in ("num_blocks", "batch_size", "num_steps")}
        return dataclasses.replace(size, **{name: value for name, value in instead.items() if value is not None})

    @property
    def name(self) -> str:
        """Short, unique within a stage, fit for a file.

        >>> Job("train", "tiny", "cpu", peer="superpipe", checkpointing=True, k=2, num_blocks=8).name
        'train-superpipe-ckpt-k2-kp1-n8'
        """
        parts = [self.task, self.peer, "ckpt" if self.checkpointing else ""]
        parts += [f"k{self.k}-kp{self.k_prime}" if self.k else "", f"n{self.num_blocks}" if self.num_blocks else ""]
        parts += [f"cap{self.cap_bytes >> 20}MiB" if self.cap_bytes else ""]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """What became of a job, seen from outside, and what its process told.

    Attributes:
        job: what was asked.
        status: how it ended.
        reason: why it did not end well; empty if it did.
        seconds: of the process's whole life.
        host_peak_bytes: most resident host memory of the process and its children while it trained (polled).
        host_life_bytes: likewise in its whole life, with building the model.
        device_used_bytes: most device memory in use on the whole device, above what was before (polled through NVML);
            None where there is no NVML.
        report: what the process told: step times, losses, the allocator's counters.
    """

    job: Job
    status: Status
    reason: str = ""
    seconds: float = 0.0
    host_peak_bytes: int = 0
    host_life_bytes: int = 0
    device_used_bytes: int | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        """Whether there are numbers."""
        return self.status is Status.OK

    @property
    def device_peak_bytes(self) -> int | None:
        """Most bytes the device's allocator had given out; None where nobody counts."""
        return self.report.get("device_peak_bytes")

    @property
    def tokens_per_s(self) -> float | None:
        """Throughput over all measured steps; None without numbers."""
        seconds = self.report.get("step_seconds")
        return len(seconds) * self.report["tokens_per_step"] / sum(seconds) if seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "status": self.status.value}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Outcome:
        """Read what ``to_dict`` returned.

        >>> outcome = Outcome(Job("train", "tiny", "cpu"), Status.LATE, "60 s were over")
        >>> Outcome.from_dict(outcome.to_dict()) == outcome
        True
        """
        return cls(**{**state, "job": Job(**state["job"]), "status": Status(state["status"])})
