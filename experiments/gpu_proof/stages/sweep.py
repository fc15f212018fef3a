"""Stage 4: the two knobs. What does each window save, and what does it cost?"""

from __future__ import annotations

from typing import Any

from experiments.gpu_proof.job import Outcome
from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, losses, ratio, share_saved, size, step_ms, throughput

__all__ = ["best_window", "grids", "run"]

GOAL_SAVED, GOAL_SPEED = 0.60, 0.95
_RESIDENT = "resident"


def run(bench: Bench) -> Findings:
    """Train the resident model and every window, all with activation checkpointing."""
    jobs = [bench.job("train", peer=_RESIDENT, checkpointing=True)]
    for k, k_prime in bench.size.windows:
        jobs.append(bench.job("train", peer="superpipe", checkpointing=True, k=k, k_prime=k_prime))
    outcomes = tuple(bench.run(job) for job in jobs)
    bad = [outcome.job.name for outcome in outcomes if not outcome.is_ok]
    return Findings(outcomes, problem=f"without numbers: {', '.join(bad)}" if bad else "")


def resident_of(outcomes: tuple[Outcome, ...]) -> Outcome | None:
    """Return what the windows are compared with; None if it has no numbers."""
    return next((outcome for outcome in outcomes if outcome.job.peer == _RESIDENT and outcome.is_ok), None)


def best_window(result: StageResult) -> dict[str, Any] | None:
    """Return the fastest window that saves enough device memory, with its saving and speed against the resident run."""
    resident = resident_of(result.outcomes)
    found = []
    for one in result.outcomes:
        if resident is None or not one.is_ok or one.job.k is None:
            continue
        peak, whole = one.device_peak_bytes, resident.device_peak_bytes
        rate, plain = one.tokens_per_s, resident.tokens_per_s
        if peak and whole and rate and plain and 1 - peak / whole >= GOAL_SAVED:
            found.append({"k": one.job.k, "k_prime": one.job.k_prime, "saved": 1 - peak / whole, "speed": rate / plain})
    return max(found, key=lambda window: window["speed"], default=None)


def grids(result: StageResult) -> list[Grid]:
    """One row for each window below the resident run."""
    resident = resident_of(result.outcomes)
    peak = resident.device_peak_bytes if resident else None
    rate = resident.tokens_per_s if resident else None
    rows = []
    for one in result.outcomes:
        told = one.report.get("superpipe", {})
        window = [str(one.job.k), str(one.job.k_prime)] if one.job.k else [_RESIDENT, UNKNOWN]
        numbers = [size(one.device_peak_bytes), share_saved(one.device_peak_bytes, peak), step_ms(one)]
        loads = f"{told['last_step_num_loads']:.0f}" if told else UNKNOWN
        rows.append(
            [
                *window,
                *numbers,
                throughput(one),
                ratio(one.tokens_per_s, rate),
                loads,
                losses(one) if one.is_ok else one.reason,
            ]
        )
    columns = ["k", "k'", "device peak", "saved", "step ms", "tokens/s", "of resident", "loads/step", "loss"]
    return [Grid("Windows", columns, rows, f"All with activation checkpointing. {_verdict(result)}")]


def _verdict(result: StageResult) -> str:
    goal = f"Goal: {GOAL_SAVED:.0%} saved at {GOAL_SPEED:.0%} of the resident throughput"
    if result.emulated:
        return f"{goal}; an emulation cannot show it."
    best = best_window(result)
    if best is None:
        return f"{goal}: missed, no window saves that much."
    met = "met" if best["speed"] >= GOAL_SPEED else "missed"
    return f"{goal}: {met} (k={best['k']}, k'={best['k_prime']}: {best['saved']:.1%} at {best['speed']:.1%})."
