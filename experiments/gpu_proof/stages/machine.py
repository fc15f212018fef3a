"""Stage 2: what the machine can do."""

from __future__ import annotations

from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, size
from lightning_superpipe.observe import MachineProfile, Route

__all__ = ["grids", "profile_of", "run"]


def run(bench: Bench) -> Findings:
    """Measure copies and updates in a process of their own; ``profile.json`` is the profile alone."""
    outcome = bench.run(bench.job("profile", device="cpu" if bench.device == "emu" else bench.device))
    if outcome.is_ok:
        MachineProfile.from_dict(outcome.report).save(bench.out / "profile.json")
    return Findings((outcome,), problem=outcome.reason)


def profile_of(result: StageResult) -> MachineProfile | None:
    """Return the profile; None where it was not measured."""
    return next((MachineProfile.from_dict(one.report) for one in result.outcomes if one.is_ok), None)


def grids(result: StageResult) -> list[Grid]:
    """Copies by size, and updates by threads."""
    profile = profile_of(result)
    if profile is None:
        return []
    rates = {(copy.pinned, copy.route, copy.num_bytes): f"{copy.gb_s:.1f}" for copy in profile.copies}
    kinds = sorted({(pinned, route) for pinned, route, _ in rates}, key=lambda kind: (not kind[0], kind[1].value))
    columns = [f"{'pinned' if pinned else 'pageable'} {_ROUTES[route]}" for pinned, route in kinds]
    rows = [
        [size(num_bytes), *(rates.get((*kind, num_bytes), UNKNOWN) for kind in kinds)]
        for num_bytes in sorted({copy.num_bytes for copy in profile.copies})
    ]
    note = "GB/s (10^9 bytes), median; both at once: both ways together."
    updates = [
        [update.dtype, str(update.num_threads), f"{update.parameters_per_s / 1e9:.2f}"] for update in profile.updates
    ]
    return [
        Grid("Copies between host and device", ["size", *columns], rows, note),
        Grid("Fused AdamW on the host", ["dtype", "threads", "10^9 parameters/s"], updates),
    ]


_ROUTES = {Route.H2D: "H2D", Route.D2H: "D2H", Route.BOTH: "both at once"}
