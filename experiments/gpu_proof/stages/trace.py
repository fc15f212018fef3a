"""Stage 3: one recorded step. Do copies run beside compute, and how near do they come to the link?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, size
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe import MachineProfile, Route

__all__ = ["grids", "run"]

GOAL_OF_LINK = 0.90
_BOUND = 0.05  # share of a step: less waiting than that is none
_LANES = {"compute": None, "h2d": Route.H2D, "d2h": Route.D2H, "host": None}


def run(bench: Bench) -> Findings:
    """Record a step; ``trace/trace.json`` opens in https://ui.perfetto.dev."""
    k, k_prime = bench.size.peer_window
    folder = bench.out / "trace"
    outcome = bench.run(bench.job("trace", checkpointing=True, k=k, k_prime=k_prime, folder=str(folder)))
    facts = {"link_gb_s": _link(bench.out / "profile.json")}
    named = replace(outcome, job=replace(outcome.job, folder=folder.name))  # a result must not depend on where it lies
    return Findings((named,), facts, outcome.reason)


def _link(profile: Path) -> dict[str, float | None]:
    """Return the measured bandwidth of each copy lane; empty where the machine stage did not run."""
    try:
        measured = MachineProfile.load(profile)
    except (OSError, SuperpipeError):
        return {}
    pinned = not measured.emulated
    return {route.value: measured.link_gb_s(route, pinned=pinned) for route in (Route.H2D, Route.D2H)}


def _verdict(result: StageResult) -> str:
    """Say how near weights came to the link, where they were what compute waited for."""
    told = result.outcomes[0].report
    rate, link = told["gb_s_while_busy"]["h2d"], result.facts["link_gb_s"].get("h2d")
    goal = f"Goal: {GOAL_OF_LINK:.0%} of the link while transfers are the bottleneck"
    if result.emulated:
        return f"{goal}; an emulation cannot show it."
    if not rate or not link:
        return f"{goal}: the stage machine must run before, into the same folder."
    if told["stall_s"] < _BOUND * told["step_s"]:
        return f"{goal}: compute waits too little for that."
    return f"{goal}: {'met' if rate >= GOAL_OF_LINK * link else 'missed'} ({rate / link:.0%})."


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
    times = f"; step {1e3 * told['step_s']:,.1f} ms, compute waits {1e3 * told['stall_s']:,.1f} ms"
    window = f"k={told['k']}, k'={told['k_prime']}, {told['num_units']} units{'' if result.emulated else times}."
    note = " ".join(filter(None, [window, f"Files: {', '.join(told['files'])}.", told["note"], _verdict(result)]))
    columns = ["lane", "busy ms", "of the step", "moved", "GB/s while busy", "of the measured link"]
    return [Grid("One step on four lanes", columns, rows, note)]
