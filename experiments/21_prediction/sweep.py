"""The setting that is chosen, against the best of a sweep that tries them all.

For each model behind its link every setting of a sweep is run: its step time and its peak. A budget of device memory
then says which of them are allowed, and the fastest of these is what the choice has to match. The choice knows only the
unit profile of one setting. It and the best few of the sweep are run again, in turns, and these times are compared.

Each model is a part of its own: ``--only NAME`` runs one. What has results is left; ``--again`` begins anew, and
``--choice`` only chooses again under the sweeps there are. ``--most N`` runs so many settings at most: the next call,
without ``--again``, goes on where that one ended, and the choice comes last, in a call that finds the sweep complete.
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
from running import profiled, run

from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning import Limits, Setting, Speeds, Workload, choose

BASE = Setting(k=3)
BUDGETS = (0.45, 0.7)  # of what the largest setting of the sweep takes
NUM_BEST, NUM_TURNS = 4, 3  # so many of the fastest are run again, so often
NUM_LARGE = 200  # units, for the time of planning


def settings(num_units: int) -> list[Setting]:
    """All windows and policies of the sweep."""
    windows = [(1, 1, 0), (2, 1, 0), (3, 1, 0), (3, 2, 0), (5, 1, 0), (num_units, 1, 0), (2, 1, 2), (2, 1, 4)]
    half, rest = num_units // 2, num_units - num_units // 2
    policies = [(name,) * num_units for name in ("keep", "recompute", "offload")]
    policies += [(name,) * half + ("keep",) * rest for name in ("recompute", "offload")]
    policies += [("offload",) * half + ("recompute",) * rest]
    return [Setting(*window, each) for each in policies for window in windows]


def _is_complete(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and len(rows) == len(settings(len(rows[0]["setting"]["activations"])))


def sweep(job: Job, rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """Run the settings of the sweep that are not in ``rows``, at most so many of them, and return all rows."""
    profile, rows = profiled(job, BASE), list(rows)
    names = [unit.name for unit in profile.workload.units]
    for setting in settings(len(names))[len(rows) :][:most]:
        each = run(job, setting, num_steps=3, names=names, warm_up=2)
        rows.append({"setting": asdict(setting), "ms": each.median_ms, "bytes": each.peak.total})
    return rows


def compare(job: Job, rows: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Choose under each budget, and run the choice and the best few of the sweep in turns."""
    profile = profiled(job, BASE)
    largest = max(row["bytes"] for row in rows)
    pairs = [_pair(job, profile, rows, int(share * largest), num_steps) for share in BUDGETS]
    return {"pairs": pairs, "planning_s": planning_seconds(profile.workload, profile.speeds)}


def _pair(job: Job, profile: UnitProfile, rows: list[dict[str, Any]], budget: int, num_steps: int) -> dict[str, Any]:
    names = [unit.name for unit in profile.workload.units]
    choice = choose(profile.workload, profile.speeds, Limits(device_bytes=budget))
    fitting = [row for row in rows if row["bytes"] <= budget]
    best = sorted(fitting, key=lambda row: row["ms"])[:NUM_BEST]
    runs = [choice.setting, *(_setting(row["setting"]) for row in best)]
    times: list[list[float]] = [[] for _ in runs]
    largest = 0
    for _ in range(NUM_TURNS):
        for index, setting in enumerate(runs):
            each = run(job, setting, num_steps=num_steps, names=names, warm_up=2)
            times[index] += each.step_ms
            largest = max(largest, each.peak.total) if index == 0 else largest
    again = [statistics.median(each) for each in times]
    return {
        "budget_bytes": budget,
        "explanation": choice.explain(),
        "setting": asdict(choice.setting),
        "predicted_ms": 1e3 * choice.prediction.step_s,
        "measured_ms": again[0],
        "measured_bytes": largest,
        "best": [
            {"setting": row["setting"], "ms": ms, "bytes": row["bytes"]}
            for row, ms in zip(best, again[1:], strict=True)
        ],
        "num_allowed": len(fitting),
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
            best = best_of(pair)
            table.add_row(
                state["name"],
                f"{pair['budget_bytes'] / 1e6:.0f} MB",
                f"{words(pair['setting'])}: {pair['measured_ms']:.0f} ms",
                f"{words(best['setting'])}: {best['ms']:.0f} ms",
                str(pair["num_allowed"]),
                f"{pair['measured_ms'] / best['ms']:.3f}",
            )
    return table


def best_of(pair: dict[str, Any]) -> dict[str, Any]:
    """The fastest of the best few, when all were run in turns."""
    return min(pair["best"], key=lambda each: each["ms"])


def words(setting: dict[str, Any]) -> str:
    """Return a setting in few words."""
    counts = {policy: setting["activations"].count(policy) for policy in dict.fromkeys(setting["activations"])}
    policies = " ".join(f"{count} {policy}" for policy, count in counts.items())
    return f"k={setting['k']} k'={setting['k_prime']} +{setting['resident']}, {policies}"


def main() -> None:
    """Sweep the models that have no results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run in turns")
    parser.add_argument("--only", default=None, help="one model, by its name")
    parser.add_argument("--again", action="store_true", help="also where there are results")
    parser.add_argument("--most", type=int, default=None, help="settings of a sweep to run in this call")
    parser.add_argument("--choice", action="store_true", help="only choose again, under the sweeps there are")
    options = parser.parse_args()
    with_steady_allocator()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    have = {} if options.again else {state["name"]: state for state in newest("sweep")}
    for job in sweep_jobs():
        if options.only not in (None, job.name):
            continue
        state = have.get(job.name) or {"told": job.told, "link": asdict(job.link), "rows": [], "pairs": []}
        if not _is_complete(state["rows"]):
            state["rows"] = sweep(job, state["rows"], options.most)
            save("sweep", job.name, state)
            if options.most is not None:
                print(f"{job.name}: {len(state['rows'])} settings so far")
                continue
        if options.choice or not state["pairs"]:
            print(save("sweep", job.name, {**state, **compare(job, state["rows"], options.steps)}))
    states = [state for state in newest("sweep") if state["pairs"]]
    Console(width=160).print(table_of(states))
    print(f"planning of {NUM_LARGE} units: at most {max(max(state['planning_s']) for state in states):.2f} s")


if __name__ == "__main__":
    main()
