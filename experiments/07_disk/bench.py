"""Weights and optimizer states in files: a training state beyond a memory limit, disk rates, and the pace of a step.

Run from the repository: ``python experiments/07_disk/bench.py``; Linux, about ten gigabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from compare import GRID, measure_grid, prediction_lines
from limits import run_worker
from rates import Rates, measure, plain_rates
from records import write_down
from safetensors.torch import save_file
from work import Job, network

HERE = Path(__file__).resolve().parent
MIB = 2**20
STAGES = ("limit", "rates", "pace", "grid", "parts")
IN_FILES = {"weights": "disk", "states": "disk"}
ALL_IN_FILES = {**IN_FILES, "gradients": "disk"}
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two states, float32
ROUNDS, PACE_ROUNDS = 5, 2
LOOPS = ("plain", "announced", "trainer")


def write_weights(folder: Path, width: int, blocks: int, seed: int) -> None:
    """Write the initial weights, a file for each block."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in network(width, 1)[0].named_parameters()}
    for block in range(blocks):
        tensors = {f"{block}.{name}": torch.randn(s, generator=generator) * 0.02 for name, s in shapes.items()}
        save_file(tensors, folder / f"block-{block:03}.safetensors")


def run(job: Job) -> dict[str, Any]:
    """Do a job in a process of its own."""
    found: dict[str, Any] = run_worker(str(HERE / "work.py"), json.dumps(job._asdict()))
    return found


def limit(job: Job, factor: float) -> dict[str, Any]:
    """Train with a memory limit below the training state, and without files or limit; compare the bits."""
    state_bytes = BYTES_PER_PARAMETER * 8 * job.width**2 * job.blocks
    job = job._replace(watches=True)
    limited = run(job._replace(store=ALL_IN_FILES, limit_bytes=int(state_bytes / factor)))
    plain = run(job._replace(store=None))
    sums = limited.pop("sums"), plain.pop("sums")
    is_equal = sums[0] == sums[1] and limited["losses"] == plain["losses"]
    return {
        "state_bytes": state_bytes,
        "limit_bytes": int(state_bytes / factor),
        "tensors_compared": len(sums[0]),
        "is_equal": is_equal,
        "limited": limited,
        "plain": plain,
    }


def pace(job: Job, folder: Path, loops: list[str], batches: list[int]) -> list[dict[str, Any]]:
    """Time steps with files against the same in memory, and against what the disk needs for their bytes.

    A virtual machine is as fast as its neighbours let it: disk and ordinary run are measured before and after each run.
    """
    rows = []
    for batch in batches:
        for loop in loops:
            way = job._replace(batch=batch, with_trainer=loop == "trainer", announces=loop == "announced")
            around, ordinary = [], [run(way)]
            around.append(measure(folder, 4 * 8 * job.width**2, job.blocks, PACE_ROUNDS))
            stored = run(way._replace(store=IN_FILES))
            around.append(measure(folder, 4 * 8 * job.width**2, job.blocks, PACE_ROUNDS))
            ordinary.append(run(way))
            row = {"loop": loop, "batch": batch} | _paced(stored, ordinary, around)
            rows.append(row | {name: stored[name] for name in ("read_bytes", "written_bytes", "step_seconds")})
            print(_pace_line(row), flush=True)
    return rows


def _paced(stored: dict[str, Any], ordinary: list[dict[str, Any]], around: list[Rates]) -> dict[str, float]:
    """Return the seconds of a step, of compute and of the disk, and the least that the loop's rule allows.

    A loop that promises nothing updates under the next forward alone: then each pass has a bound of its own.
    """

    def seconds(found: list[dict[str, Any]], name: str) -> float:
        # The first steps make states and fill caches; the last one's update has nothing to hide under.
        return statistics.median([each for run in found for each in run[name][2:]])

    read, write = plain_rates(around)
    step, compute = seconds([stored], "step_seconds"), seconds(ordinary, "step_seconds")
    disk = stored["read_bytes"] / read + stored["written_bytes"] / write
    row = {"step_s": step, "compute_s": compute, "disk_s": disk, "bound_s": max(compute, disk)}
    if "forward_seconds" in stored:
        forward = seconds(ordinary, "forward_seconds")
        back = stored["backward_bytes"][0] / read + stored["backward_bytes"][1] / write
        row |= {"by_pass_s": max(forward, disk - back) + max(compute - forward, back)}
    return row | {"over": step / row["bound_s"], "read_b_s": read, "write_b_s": write}


def parts(job: Job, batches: list[int]) -> list[dict[str, Any]]:
    """Time the same steps without streaming, streamed from host memory, and from files; with each thread's work."""
    rows = []
    for batch in batches:
        for loop, store in (("plain", None), ("plain", "host"), *((loop, IN_FILES) for loop in LOOPS[:2])):
            found = run(job._replace(batch=batch, store=store, announces=loop == "announced"))
            row = {"batch": batch, "loop": loop, "store": store, "step_s": statistics.median(found["step_seconds"][2:])}
            row["stall_s"] = found.get("stall_seconds", 0.0)
            cpu = {name: seconds / job.steps for name, seconds in found.get("cpu_seconds", {}).items()}
            row["beside_s"] = sum(seconds for name, seconds in cpu.items() if name.startswith("superpipe"))
            rows.append(row | {"cpu_s_per_step": cpu})
            print(
                f"batch {batch}, {loop}, {store or 'ordinary'}: step {row['step_s']:.2f} s, of which compute waits "
                f"{row['stall_s']:.2f} s; threads beside it {row['beside_s']:.2f} s",
                flush=True,
            )
    return rows


def _pace_line(row: dict[str, Any]) -> str:
    return (
        f"{row['loop']}, batch {row['batch']}: step {row['step_s']:.2f} s, compute {row['compute_s']:.2f} s, "
        f"disk {row['disk_s']:.2f} s ({row['read_b_s'] / 1e9:.2f} and {row['write_b_s'] / 1e9:.2f} GB/s); "
        f"{row['over']:.2f} times the larger"
        + (f", {row['step_s'] / row['by_pass_s']:.2f} times what each pass allows" if row["loop"] == "plain" else "")
    )


def main() -> None:
    """Run the stages, show what they give, and write it down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="*", help="result files: show their grids, run nothing")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES)
    parser.add_argument("--blocks", type=int, default=96, help="of 8 * width ** 2 parameters")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="of the stage 'limit'")
    parser.add_argument("--pace-steps", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 1024], help="of the stage 'pace'")
    parser.add_argument("--loops", nargs="*", default=LOOPS, choices=LOOPS, help="of the stage 'pace'")
    parser.add_argument("--factor", type=float, default=3.0, help="training state over memory limit")
    parser.add_argument("--folder", type=Path, help="on a disk; a temporary one if left out")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    options = parser.parse_args()
    if options.table:
        for path in options.table:
            print("\n".join(prediction_lines(json.loads(path.read_text())["grid"])))
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, seed = Path(name), 0
        write_weights(folder / "initial", options.width, options.blocks, seed)
        job = Job(str(folder / "initial"), None, steps=options.steps, width=options.width, blocks=options.blocks)
        if "limit" in options.stages:
            result["limit"] = limit(job, options.factor)
        if "rates" in options.stages:
            slab_bytes = 4 * 8 * options.width**2
            result["rates"] = measure(folder, slab_bytes, options.blocks, ROUNDS, with_others=True)
        if "pace" in options.stages:
            result["pace"] = pace(job._replace(steps=options.pace_steps), folder, options.loops, options.batches)
        if "parts" in options.stages:
            result["parts"] = parts(job._replace(steps=options.pace_steps), options.batches)
        if "grid" in options.stages:
            result["grid"] = measure_grid(folder, GRID, write_weights, run)
    show(result)
    if options.out is not None:
        print(save(result, options))


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    if found := result.get("limit"):
        for way in ("limited", "plain"):
            row = found[way]
            print(
                f"{way}: own memory {row['own_bytes'] / MIB:.0f} MiB at most, with pages of files "
                f"{row['resident_bytes'] / MIB:.0f} MiB; limited by {row['limited_by']}"
            )
        print(
            f"training state {found['state_bytes'] / MIB:.0f} MiB, limit {found['limit_bytes'] / MIB:.0f} MiB; "
            f"{found['tensors_compared']} tensors equal: {found['is_equal']}"
        )
    if grid := result.get("grid"):
        print("\n".join(prediction_lines(grid)))
    for name, rates in result.get("rates", {}).items():
        print(f"{name}: {statistics.median(rates) / 1e9:.2f} GB/s ({min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f})")


def save(result: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write the numbers and where they come from."""
    folder: Path = HERE / options.out
    words = [*options.stages]
    if "pace" in words:
        words += [*options.loops, *map(str, options.batches)]
    path = folder / f"{platform.machine()}-{'-'.join(words)}-{date.today()}.json"
    write_down(path, "bench.py", options.folder, {"seed": 0, **result})
    return path


if __name__ == "__main__":
    main()
