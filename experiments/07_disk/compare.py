"""Step times with files: measured for a grid of settings, and as the simulation predicts them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rates import measure
from work import Job

from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve

IN_FILES = {"weights": "disk", "states": "disk"}
UPDATES = {"plain": "after_backward", "announced": "in_backward"}
PROFILED_STEPS, TIMED_STEPS, NUM_WARM, ROUNDS = 8, 7, 2, 2


class Model(NamedTuple):
    """A network and its batch, with the settings it is trained under."""

    width: int
    blocks: int
    batch: int
    ks: tuple[int, ...]
    rings: tuple[int, ...]


GRID = (Model(512, 24, 128, (2, 4), (2, 5)), Model(1024, 6, 512, (2,), (3,)))


def measure_grid(
    folder: Path,
    grid: Sequence[Model],
    write_weights: Callable[[Path, int, int, int], None],
    run: Callable[[Job], dict[str, Any]],
) -> dict[str, Any]:
    """Run each model under each setting; what its units take is measured in a run without files."""
    profiles: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for model in grid:
        initial, slab_bytes = folder / f"grid-{model.width}", 4 * 8 * model.width**2
        write_weights(initial, model.width, model.blocks, 0)
        job = Job(str(initial), "host", batch=model.batch, width=model.width, blocks=model.blocks)
        for k in model.ks:
            name, file = f"{model.width}, k={k}", folder / "profile.json"
            run(job._replace(steps=PROFILED_STEPS, k=k, profile=str(file)))
            profiles[name] = json.loads(file.read_text())
            for ring in model.rings:
                for loop in UPDATES:
                    rates = measure(folder, slab_bytes, model.blocks, ROUNDS)
                    announces = loop == "announced"
                    way = job._replace(store=IN_FILES, steps=TIMED_STEPS, k=k, ring=ring, announces=announces)
                    found = run(way)
                    row = {"width": model.width, "blocks": model.blocks, "batch": model.batch, "k": k, "ring": ring}
                    row |= {"loop": loop, "step_seconds": found["step_seconds"]}
                    row |= {name: found[name] for name in ("read_bytes", "written_bytes")}
                    row |= {f"{way}_b_s": statistics.median(rates[f"store_{way}"]) for way in ("read", "write")}
                    rows.append(row | {"profile": name})
    return {"profiles": profiles, "rows": rows}


def predicted_s(row: dict[str, Any], profile: UnitProfile) -> float:
    """Return the step that the simulation expects, seconds."""
    workload = with_files(profile.workload, set(IN_FILES), ring=row["ring"])
    curves = {f"disk_{way}": Curve.steady(row[f"{way}_b_s"]) for way in ("read", "write")}
    setting = replace(profile.setting, update=UPDATES[row["loop"]])
    return simulate(workload, replace(profile.speeds, **curves), setting).step_s


def prediction_lines(grid: dict[str, Any]) -> list[str]:
    """Return a table of what was measured and what the simulation expects."""
    lines = [
        "| width x blocks, batch | k | ring | loop | measured | predicted | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in grid["rows"]:
        step_s = statistics.median(row["step_seconds"][NUM_WARM:])
        found_s = predicted_s(row, UnitProfile.parse(grid["profiles"][row["profile"]]))
        lines.append(
            f"| {row['width']} x {row['blocks']}, {row['batch']} | {row['k']} | {row['ring']} | {row['loop']} | "
            f"{step_s:.2f} | {found_s:.2f} | {found_s / step_s - 1:+.0%} |"
        )
    return lines
