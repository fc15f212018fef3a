"""Step time and peak bytes: predicted from the unit profile of one setting, measured in runs of many.

For each model one short run gives its unit profile: what each unit computes, holds and copies. From it every other
setting is predicted, and then run. The link is emulated; compute is real, or takes as long as it is told to.

Each model is a part of its own: ``--only GPT-2`` runs one, and without ``--again`` those whose results exist are left.
``--predict`` runs nothing: it predicts anew from the unit profiles in the results, and leaves what was measured.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from jobs import Job, jobs
from results_file import newest, rewrite, save, with_steady_allocator
from rich.console import Console
from rich.table import Table
from running import profiled, run

from lightning_superpipe.planning import Curve, Setting, Speeds, UnitWork, Workload, simulate

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
        measured = run(job, setting, num_steps=num_steps, names=names)
        rows.append(
            {
                "policy": policy,
                "k": setting.k,
                "k_prime": setting.k_prime,
                "resident": setting.resident,
                **predicted(profile.workload, profile.speeds, setting),
                "measured_ms": measured.median_ms,
                "all_ms": measured.step_ms,
                "measured_bytes": measured.peak._asdict(),
                "last_loss": measured.last_loss,
            }
        )
    link, workload, speeds = asdict(job.link), asdict(profile.workload), asdict(profile.speeds)
    return {"told": job.told, "link": link, "workload": workload, "speeds": speeds, "rows": rows}


def predicted(workload: Workload, speeds: Speeds, setting: Setting) -> dict[str, Any]:
    """Return the part of a row that is simulated."""
    start = time.perf_counter()
    found = simulate(workload, speeds, setting)
    return {
        "predicted_ms": 1e3 * found.step_s,
        "bound_ms": 1e3 * found.bound_s,
        "predicted_bytes": found.peak._asdict(),
        "peak_at": found.peak_at,
        "simulated_ms": 1e3 * (time.perf_counter() - start),
    }


def predict_again(state: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a model with predictions as they are now, from the profile that was measured."""
    work = dict(state["workload"])
    units = tuple(UnitWork(**{**unit, "policies": tuple(unit["policies"])}) for unit in work.pop("units"))
    workload = Workload(units, **work)
    speeds = Speeds(**{name: _curve(each) if name != "use_s" else each for name, each in state["speeds"].items()})
    plans = zip(settings(len(units)), state["rows"], strict=True)
    rows = [{**row, **predicted(workload, speeds, setting)} for (_, setting), row in plans]
    return {**state, "rows": rows}


def _curve(state: dict[str, Any] | None) -> Curve | None:
    return None if state is None else Curve(tuple((size, seconds) for size, seconds in state["points"]))


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
    parser.add_argument("--predict", action="store_true", help="only predict again, from the profiles there are")
    options = parser.parse_args()
    with_steady_allocator()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for state in newest("grid") if options.predict else []:
        rewrite("grid", predict_again(state))
    have = {state["name"] for state in newest("grid")}
    for job in [] if options.predict else jobs():
        if (options.only is None and (job.name not in have or options.again)) or options.only == job.name:
            print(save("grid", job.name, compare(job, options.steps)))
    for state in newest("grid"):
        Console(width=120).print(table_of(state))
    off = [errors(row) for state in newest("grid") for row in state["rows"]]
    print(f"{len(off)} settings; within 10 % of the time: {sum(abs(time) <= 0.1 for time, _ in off)}")
    print(f"within 3 % of the bytes: {sum(abs(size) <= 0.03 for _, size in off)}")


if __name__ == "__main__":
    main()
