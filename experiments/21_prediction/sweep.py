"""The setting that is chosen, against the best of a sweep that tries them all.

For each model behind its link every setting of a sweep is run once: its step time and its peak. A budget of device
memory then says which of them are allowed, and the fastest of these is what the choice has to match. The choice knows
only the unit profile of one setting, and is run as well.

Each model is a part of its own: ``--only NAME`` runs one, and without ``--again`` those whose results exist are left.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
from jobs import Job, sweep_jobs
from results_file import newest, save, with_steady_allocator
from rich.console import Console
from rich.table import Table
from running import run

from lightning_superpipe.planning import Limits, Setting, Speeds, Workload, choose

BASE = Setting(k=3)
BUDGETS = (0.45, 0.7)  # of what the largest setting of the sweep takes
NUM_LARGE = 200  # units, for the time of planning


def settings(num_units: int) -> list[Setting]:
    """All windows and policies of the sweep."""
    windows = [(1, 1, 0), (2, 1, 0), (3, 1, 0), (3, 2, 0), (5, 1, 0), (num_units, 1, 0), (2, 1, 2), (2, 1, 4)]
    half, rest = num_units // 2, num_units - num_units // 2
    policies = [(name,) * num_units for name in ("keep", "recompute", "offload")]
    policies += [(name,) * half + ("keep",) * rest for name in ("recompute", "offload")]
    policies += [("offload",) * half + ("recompute",) * rest]
    return [Setting(*window, each) for each in policies for window in windows]


def sweep(job: Job, num_steps: int, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Run every setting, unless ``rows`` holds them already, then what is chosen under each budget."""
    run(job, BASE, num_steps=1)  # a process's first steps are slower: memory is new, threads start
    profile = run(job, BASE, num_steps=1).profile
    names, is_known = [unit.name for unit in profile.workload.units], rows is not None
    rows = rows or []
    for setting in [] if is_known else settings(len(names)):
        each = run(job, setting, num_steps=num_steps, names=names)
        rows.append({"setting": asdict(setting), "ms": each.median_ms, "bytes": each.peak.total})
    largest, pairs = max(row["bytes"] for row in rows), []
    for share in BUDGETS:
        limits = Limits(device_bytes=int(share * largest))
        choice = choose(profile.workload, profile.speeds, limits)
        chosen = run(job, choice.setting, num_steps=num_steps, names=names)
        fitting = [row for row in rows if row["bytes"] <= limits.device_bytes]
        best = min(fitting, key=lambda row: row["ms"])
        again = run(job, _setting(best["setting"]), num_steps=num_steps, names=names)
        pairs.append(
            {
                "budget_bytes": limits.device_bytes,
                "explanation": choice.explain(),
                "setting": asdict(choice.setting),
                "predicted_ms": 1e3 * choice.prediction.step_s,
                "measured_ms": chosen.median_ms,
                "measured_bytes": chosen.peak.total,
                "best_setting": best["setting"],
                "best_ms": best["ms"],
                "best_again_ms": again.median_ms,
                "num_allowed": len(fitting),
            }
        )
    return {
        "told": job.told,
        "link": asdict(job.link),
        "rows": rows,
        "pairs": pairs,
        "planning_s": planning_seconds(profile.workload, profile.speeds),
    }


def _setting(state: dict[str, Any]) -> Setting:
    return Setting(**{**state, "activations": tuple(state["activations"])})


def planning_seconds(workload: Workload, speeds: Speeds) -> list[float]:
    """How long a choice takes for a model of this kind with many units, under tight and wide limits, seconds."""
    count = -(-NUM_LARGE // len(workload.units))
    large = replace(workload, units=(workload.units * count)[:NUM_LARGE])
    whole = sum(unit.weight_bytes + unit.activation_bytes for unit in large.units)
    seconds = []
    for share in (0.2, 0.35, 0.5, 0.7):
        start = time.perf_counter()
        choose(large, speeds, Limits(device_bytes=int(share * whole)))
        seconds.append(time.perf_counter() - start)
    return seconds


def table_of(states: list[dict[str, Any]]) -> Table:
    """Return a row for each model and budget."""
    table = Table("model", "budget", "chosen", "best of the sweep", "allowed", "chosen / best")
    for state in states:
        for pair in state["pairs"]:
            table.add_row(
                state["name"],
                f"{pair['budget_bytes'] / 1e6:.0f} MB",
                f"{words(pair['setting'])}: {pair['measured_ms']:.0f} ms",
                f"{words(pair['best_setting'])}: {best_ms(pair):.0f} ms",
                str(pair["num_allowed"]),
                f"{pair['measured_ms'] / best_ms(pair):.3f}",
            )
    return table


def best_ms(pair: dict[str, Any]) -> float:
    """The fastest setting's time: of two runs, since the fastest of many is also the luckiest."""
    return statistics.mean((pair["best_ms"], pair["best_again_ms"]))


def words(setting: dict[str, Any]) -> str:
    """Return a setting in few words."""
    counts = {policy: setting["activations"].count(policy) for policy in dict.fromkeys(setting["activations"])}
    policies = " ".join(f"{count} {policy}" for policy, count in counts.items())
    return f"k={setting['k']} k'={setting['k_prime']} +{setting['resident']}, {policies}"


def main() -> None:
    """Sweep the models that have no results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each setting")
    parser.add_argument("--only", default=None, help="one model, by its name")
    parser.add_argument("--again", action="store_true", help="also where there are results")
    parser.add_argument("--choice", action="store_true", help="only choose again, under the sweeps there are")
    options = parser.parse_args()
    with_steady_allocator()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    have = {state["name"]: state["rows"] for state in newest("sweep")}
    for job in sweep_jobs():
        if options.choice and job.name in have:
            print(save("sweep", job.name, sweep(job, options.steps, have[job.name])))
        elif (options.only is None and (job.name not in have or options.again)) or options.only == job.name:
            print(save("sweep", job.name, sweep(job, options.steps)))
    states = newest("sweep")
    Console(width=160).print(table_of(states))
    print(f"planning of {NUM_LARGE} units: at most {max(max(state['planning_s']) for state in states):.2f} s")


if __name__ == "__main__":
    main()
