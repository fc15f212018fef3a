"""Stage 3: one recorded step. Do copies run beside compute, and how near do they come to the link?"""

from __future__ import annotations

from pathlib import Path

from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, size
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe import MachineProfile, Route

__all__ = ["grids", "run"]

_LANES = {"compute": None, "h2d": Route.H2D, "d2h": Route.D2H, "host": None}


def run(bench: Bench) -> Findings:
    """Record a step; ``trace/trace.json`` opens in https://ui.perfetto.dev."""
    k, k_prime = bench.size.peer_window
    folder = bench.out / "trace"
    outcome = bench.run(bench.job("trace", checkpointing=True, k=k, k_prime=k_prime, folder=str(folder)))
    facts = {"link_gb_s": _link(bench.out / "profile.json")}
    return Findings((outcome,), facts, outcome.reason)


def _link(profile: Path) -> dict[str, float | None]:
    """Return the measured bandwidth of each copy lane; empty where the machine stage did not run."""
    try:
        measured = MachineProfile.load(profile)
    except (OSError, SuperpipeError):
        return {}
    pinned = not measured.emulated
    return {route.value: measured.link_gb_s(route, pinned=pinned) for route in (Route.H2D, Route.D2H)}


def grids(result: StageResult) -> list[Grid]:
    """What each lane did."""
    done = [outcome.report for outcome in result.outcomes if outcome.is_ok]
    if not done:
        return []
    told, links = done[0], result.facts["link_gb_s"]
    rows = []
    for lane in _LANES:
        busy = told["busy_s"][lane]
        rate, link = told["gb_s_while_busy"].get(lane), links.get(lane)
        shares = [UNKNOWN if rate is None else f"{rate:.1f}", f"{rate / link:.0%}" if rate and link else UNKNOWN]
        moved = size(told["moved_bytes"].get(lane))
        rows.append([lane, f"{1e3 * busy:,.1f}", f"{busy / told['step_s']:.0%}", moved, *shares])
    note = (
        f"k={told['k']}, k'={told['k_prime']}, {told['num_units']} units; step {1e3 * told['step_s']:,.1f} ms, compute "
        f"waits {1e3 * told['stall_s']:,.1f} ms. Files: {', '.join(told['files'])}. {told['note']}".strip()
    )
    columns = ["lane", "busy ms", "of the step", "moved", "GB/s while busy", "of the measured link"]
    return [Grid("One step on four lanes", columns, rows, note)]
