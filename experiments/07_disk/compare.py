"""Step times and bytes with files: measured for a grid of settings, and as runs predict them from their first steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from work import Job

from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.simulate import simulate

IN_FILES = {"weights": "disk", "states": "disk"}
UPDATES = {"plain": "after_backward", "announced": "in_backward"}
NUM_STEPS, NUM_MEASURED = 16, 6  # the first are warm, then three are measured; what is compared comes behind them
MIB = 1 << 20


class Model(NamedTuple):
    """A network and its batch, with windows and rings to train it under."""

    width: int
    blocks: int
    batch: int
    settings: tuple[tuple[int, int], ...] = ((3, 3), (1, 3), (8, 3), (3, 2))
    activations: str = "keep"


GRID = (
    Model(512, 24, 32),
    Model(512, 24, 128),
    Model(1024, 6, 512, ((2, 3), (3, 3))),
    Model(512, 24, 512, ((3, 3), (2, 3)), "offload"),
)


def measure_grid(
    folder: Path,
    grid: Sequence[Model],
    write_weights: Callable[[Path, int, int, int], None],
    run: Callable[[Job], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run each model under each setting; each run tells what to expect of itself, and of the one that comes next."""
    rows: list[dict[str, Any]] = []
    for model in grid:
        initial, file = folder / f"grid-{model.width}-{model.blocks}", folder / "profile.json"
        if not initial.exists():
            write_weights(initial, model.width, model.blocks, 0)
        store = IN_FILES | ({"activations": "disk"} if model.activations == "offload" else {})
        job = Job(str(initial), store, batch=model.batch, width=model.width, activations=model.activations)
        job = job._replace(blocks=model.blocks, profile=str(file), steps=NUM_STEPS)
        before: UnitProfile | None = None
        for (k, ring), loop in ((setting, loop) for setting in model.settings for loop in UPDATES):
            found = run(job._replace(k=k, ring=ring, announces=loop == "announced"))
            row = {"model": f"{model.width} x {model.blocks}, {model.batch}", "activations": model.activations}
            row |= {"k": k, "ring": ring, "loop": loop, "step_seconds": found["step_seconds"]}
            row |= {name: found[name] for name in ("read_bytes", "written_bytes")}
            own = UnitProfile.load(file)
            for name, profile in (("own", own), ("before", before)):
                row[f"predicted_{name}"] = None if profile is None else predicted(row, profile)
            before = own
            rows.append(row)
            print(prediction_line(row), flush=True)
    return rows


def predicted(row: dict[str, Any], profile: UnitProfile) -> dict[str, Any]:
    """Return what the simulation expects of a run: seconds of a step, and bytes."""
    setting = replace(profile.setting, k=row["k"], update=UPDATES[row["loop"]])
    found = simulate(replace(profile.workload, ring=row["ring"]), profile.speeds, setting)
    return {
        "step_s": found.step_s,
        "read_bytes": found.disk.read_bytes,
        "written_bytes": found.disk.written_bytes,
        "busiest": found.busiest,
    }


def prediction_line(row: dict[str, Any]) -> str:
    """Return a row of the table: what was measured, and what was expected."""
    step_s, own = statistics.median(row["step_seconds"][NUM_MEASURED:]), row["predicted_own"]
    moved = [f"{row[name] / MIB:.0f} / {own[name] / MIB:.0f}" for name in ("read_bytes", "written_bytes")]
    told = [
        "" if each is None else f"{each['step_s']:.2f} ({each['step_s'] / step_s - 1:+.0%})"
        for each in (own, row["predicted_before"])
    ]
    name = f"{row['model']}{', offloaded' * (row['activations'] == 'offload')}"
    return (
        f"| {name} | {row['k']} | {row['ring']} | {row['loop']} | {step_s:.2f} | {told[0]} | {told[1]} | "
        f"{own['busiest']} | {moved[0]} | {moved[1]} |"
    )


def prediction_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of what was measured and what was expected."""
    return [
        "| width x blocks, batch | k | ring | loop | step | predicted by its own first steps | by the run before "
        "| busiest | MiB read / predicted | written |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(prediction_line, rows),
    ]
