"""Step times and bytes with files: measured for a grid of settings, and as predicted from one run's first steps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from work import Job

from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.prediction import Prediction
from lightning_superpipe.planning.simulate import simulate

IN_FILES = {"weights": "disk", "states": "disk"}
UPDATES = {"plain": "after_backward", "announced": "in_backward"}
PROFILED_STEPS, TIMED_STEPS, NUM_WARM = 8, 12, 2
MIB = 1 << 20


class Model(NamedTuple):
    """A network and its batch, with the settings it is trained under; the first of them is the one that is measured."""

    width: int
    blocks: int
    batch: int
    ks: tuple[int, ...]
    rings: tuple[int, ...]
    activations: str = "keep"


GRID = (
    Model(512, 24, 32, (3, 1, 8), (3, 2)),
    Model(512, 24, 128, (3, 1, 8), (3, 2)),
    Model(1024, 6, 512, (2,), (3,)),
    Model(512, 24, 1024, (3,), (3,), "offload"),
)


def measure_grid(
    folder: Path,
    grid: Sequence[Model],
    write_weights: Callable[[Path, int, int, int], None],
    run: Callable[[Job], dict[str, Any]],
) -> dict[str, Any]:
    """Run each model under each setting; its units and its disk are measured in one run, a plain loop."""
    profiles: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for model in grid:
        initial = folder / f"grid-{model.width}-{model.blocks}"
        if not initial.exists():
            write_weights(initial, model.width, model.blocks, 0)
        store = IN_FILES | ({"activations": "disk"} if model.activations == "offload" else {})
        job = Job(str(initial), store, batch=model.batch, width=model.width, activations=model.activations)
        job = job._replace(blocks=model.blocks, k=model.ks[0], ring=model.rings[0])
        name, file = f"{model.width} x {model.blocks}, {model.batch}", folder / "profile.json"
        run(job._replace(steps=PROFILED_STEPS, profile=str(file)))
        profiles[name] = json.loads(file.read_text())
        for k, ring, loop in ((k, ring, loop) for k in model.ks for ring in model.rings for loop in UPDATES):
            found = run(job._replace(steps=TIMED_STEPS, k=k, ring=ring, announces=loop == "announced"))
            row = {"model": name, "activations": model.activations, "k": k, "ring": ring, "loop": loop}
            row |= {name: found[name] for name in ("step_seconds", "read_bytes", "written_bytes")}
            rows.append(row)
            print(prediction_line(row, profiles[name]), flush=True)
    return {"profiles": profiles, "rows": rows}


def predicted(row: dict[str, Any], profile: UnitProfile) -> Prediction:
    """Return the step that the simulation expects."""
    setting = replace(profile.setting, k=row["k"], update=UPDATES[row["loop"]])
    return simulate(replace(profile.workload, ring=row["ring"]), profile.speeds, setting)


def prediction_line(row: dict[str, Any], profile: dict[str, Any]) -> str:
    """Return a row of the table: what was measured, and what the simulation expects."""
    step_s, found = statistics.median(row["step_seconds"][NUM_WARM:]), predicted(row, UnitProfile.parse(profile))
    moved = [(row["read_bytes"], found.disk.read_bytes), (row["written_bytes"], found.disk.written_bytes)]
    read, written = (f"{took / MIB:.0f} / {told / MIB:.0f}" for took, told in moved)
    return (
        f"| {row['model']}{', offloaded' * (row['activations'] == 'offload')} | {row['k']} | {row['ring']} | "
        f"{row['loop']} | {step_s:.2f} | {found.step_s:.2f} | {found.step_s / step_s - 1:+.0%} | {read} | {written} |"
    )


def prediction_lines(grid: dict[str, Any]) -> list[str]:
    """Return a table of what was measured and what the simulation expects."""
    return [
        "| width x blocks, batch | k | ring | loop | step | predicted | off by | MiB read / predicted | written |",
        "|---|---|---|---|---|---|---|---|---|",
        *(prediction_line(row, grid["profiles"][row["model"]]) for row in grid["rows"]),
    ]
