"""Jobs without a model: numbers made from k and k', so that tables and pictures have something to show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.observe.host_bytes import HostBytes
from lightning_superpipe.observe.report import PeakBytes, Report, StepCounters
from lightning_superpipe.sweeps import JobResult, Row, record_job

MIB = 2**20
NUM_UNITS = 12
ORDINARY_BYTES = 40 * MIB


def config(k: int, k_prime: int = 1, **others: Any) -> dict[str, Any]:
    return {"superpipe": {"k": k, "k_prime": k_prime, "device_memory": others.pop("device_memory", None)}, **others}


def plain(**others: Any) -> dict[str, Any]:
    return {"superpipe": None, **others}


def result(k: int, k_prime: int = 1, *, emulated: bool = True) -> JobResult:
    """Return the numbers of a job; a window that cannot be is refused by the real configuration."""
    SuperpipeConfig(k=k, k_prime=k_prime)
    counters = StepCounters(2 * NUM_UNITS - k, 0, 10 * MIB, 5 * MIB, 0.06 / k)
    report = Report(
        k=k,
        k_prime=k_prime,
        num_resident=0,
        num_units=NUM_UNITS,
        num_steps=4,
        peak=PeakBytes(slots=k * MIB, anchors=MIB // 2, gradients=MIB, activations=3 * MIB),
        resident_bytes=ORDINARY_BYTES,
        num_parameters=10_000_000,
        host=HostBytes(weights=ORDINARY_BYTES),
        last_step=counters,
        total=counters + counters,
        device="cpu",
        emulated=emulated,
        unit_overhead_us=3.0,
    )
    step_ms = 40 + 60 / k + 2 * k_prime
    return JobResult(
        loss=3.25,
        step_ms=step_ms,
        report=report,
        num_parameters=10_000_000,
        predicted_peak_bytes=(2 * k + 5) * MIB // 2,
    )


def sweep(folder: Path, ks: Iterable[int] = (1, 2, 4), k_primes: Iterable[int] = (1, 2), **options: Any) -> list[Row]:
    """Record a grid of jobs and the ordinary run."""
    rows = [
        record_job(
            folder, config(k, k_prime), lambda k=k, k_prime=k_prime: result(k, k_prime, **options), is_sweep=True
        )
        for k in ks
        for k_prime in k_primes
    ]
    return [*rows, record_job(folder, plain(), lambda: JobResult(3.25, 35.0, device="cpu"), is_sweep=True)]
