"""Step time and peak bytes: predicted from the unit profile of one setting, measured in runs of many.

For each model one short run gives its unit profile: what each unit computes, holds and copies. From it every other
setting is predicted, and then run. The link is emulated; compute is real, or takes as long as it is told to.

Each model is a part of its own: ``--only GPT-2`` runs one, and without ``--again`` those whose results exist are left.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from jobs import Job, jobs
from results_file import newest, save, with_steady_allocator
from rich.console import Console
from rich.table import Table
from running import profiled, run

from lightning_superpipe.planning import Setting, simulate

BASE = Setting(k=3)


def settings(num_units: int) -> list[tuple[str, Setting]]:
    """What is predicted and run, with a name for the policies."""
    windows = [(1, 1, 0), (2, 1, 0), (3, 2, 0), (2, 1, 4), (num_units, 1, 0)]
    mixed = tuple(("recompute", "keep", "offload")[index % 3] for index in range(num_units))
    half = ("recompute",) * (num_units // 2) + ("keep",) * (num_units - num_units // 2)
    found = [("keep", Setting(*window, ("keep",) * num_units)) for window in windows]
    for name in ("recompute", "offload"):
        found += [(name, Setting(*window, (name,) * num_units)) for window in windows[1:4]]
    return [*found, ("mixed", Setting(4, 2, 0, mixed)), ("half recompute", Setting(3, 1, 0, half))]


def compare(job: Job, num_steps: int) -> dict[str, Any]:
    """Profile one setting, predict the others, run them."""
    profile = profiled(job, BASE)
    names, rows = [unit.name for unit in profile.workload.units], []
    for policy, setting in settings(len(names)):
        start = time.perf_counter()
        predicted = simulate(profile.workload, profile.speeds, setting)
        simulated_ms = 1e3 * (time.perf_counter() - start)
        measured = run(job, setting, num_steps=num_steps, names=names)
        rows.append(
            {
                "policy": policy,
                "k": setting.k,
                "k_prime": setting.k_prime,
                "resident": setting.resident,
                "predicted_ms": 1e3 * predicted.step_s,
                "bound_ms": 1e3 * predicted.bound_s,
                "measured_ms": measured.median_ms,
                "all_ms": measured.step_ms,
                "predicted_bytes": predicted.peak._asdict(),
                "measured_bytes": measured.peak._asdict(),
                "peak_at": predicted.peak_at,
                "simulated_ms": simulated_ms,
                "last_loss": measured.last_loss,
            }
        )
    link, workload, speeds = asdict(job.link), asdict(profile.workload), asdict(profile.speeds)
    return {"told": job.told, "link": link, "workload": workload, "speeds": speeds, "rows": rows}


def errors(row: dict[str, Any]) -> tuple[float, float]:
    """Return by how much the prediction is off: step time and peak bytes, relative."""
    predicted, measured = (sum(row[f"{kind}_bytes"].values()) for kind in ("predicted", "measured"))
    return row["predicted_ms"] / row["measured_ms"] - 1, predicted / measured - 1


def table_of(state: dict[str, Any]) -> Table:
    """Return the rows of one model as people read them."""
    table = Table("policy", "k, k'", "resident", "predicted", "measured", "off", "predicted peak", "off")
    table.title = state["name"]
    for row in state["rows"]:
        time_off, bytes_off = errors(row)
        table.add_row(
            row["policy"],
            f"{row['k']}, {row['k_prime']}",
            str(row["resident"]),
            f"{row['predicted_ms']:.0f} ms",
            f"{row['measured_ms']:.0f} ms",
            f"{time_off:+.1%}",
            f"{sum(row['predicted_bytes'].values()) / 1e6:.1f} MB",
            f"{bytes_off:+.1%}",
        )
    return table


def main() -> None:
    """Run the models that have no results yet, and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--only", default=None, help="one model, by its name")
    parser.add_argument("--again", action="store_true", help="also where there are results")
    options = parser.parse_args()
    with_steady_allocator()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    have = {state["name"] for state in newest("grid")}
    for job in jobs():
        if (options.only is None and (job.name not in have or options.again)) or options.only == job.name:
            print(save("grid", job.name, compare(job, options.steps)))
    for state in newest("grid"):
        Console(width=120).print(table_of(state))
    off = [errors(row) for state in newest("grid") for row in state["rows"]]
    print(f"{len(off)} settings; within 10 % of the time: {sum(abs(time) <= 0.1 for time, _ in off)}")
    print(f"within 3 % of the bytes: {sum(abs(size) <= 0.03 for _, size in off)}")


if __name__ == "__main__":
    main()
