"""Proves the package on a machine, stage by stage; without a GPU it does the same at tiny size as an emulation.

Each stage is bounded in minutes and writes one JSON file. Everything measured runs in processes of its own: what fails
takes nothing else with it. See README.md beside this file.
Run from the repository: ``python experiments/gpu_proof/prove.py --stage tests machine --size full --out FOLDER``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for children

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from experiments.gpu_proof.job import Job  # noqa: E402
from experiments.gpu_proof.nvml import DriverView  # noqa: E402
from experiments.gpu_proof.result import Grid, StageResult, all_versions, known_outcomes  # noqa: E402
from experiments.gpu_proof.sizes import SIZES  # noqa: E402
from experiments.gpu_proof.stages import STAGES, Bench, grids, run_stage  # noqa: E402
from experiments.gpu_proof.watch import Deadline, Watcher  # noqa: E402

_CONSOLE = Console(width=160)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="which, in their own order")
    parser.add_argument("--size", choices=SIZES, help="of model and batch; full on a GPU, tiny without one")
    parser.add_argument("--device", choices=("cuda", "cpu", "emu"), help="cuda where there is one, else emu, else cpu")
    parser.add_argument("--out", type=Path, help="folder of the results; results/MACHINE-SIZE-DATE beside this script")
    parser.add_argument("--minutes", type=float, default=9.0, help="that each stage may take")
    parser.add_argument("--batch-size", type=int, help="rows of a batch, instead of the size's")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier command in this folder finished")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Run the stages; return how many are not whole."""
    options = parse(words)
    device = options.device or _device()
    size = options.size or ("full" if device == "cuda" else "tiny")
    began = datetime.now().astimezone()
    machine = _machine(device)
    label = machine.get("accelerator", "CUDA device") if device == "cuda" else f"CPU, {size} size, emulation"
    slug = "emulated" if device != "cuda" else label.lower().replace(" ", "-")
    out: Path = options.out or HERE / "results" / f"{slug}-{size}-{began.date()}"
    watcher = Watcher(device, out / "logs")
    _CONSOLE.print(f"[bold]{label}[/bold]: {', '.join(f'{name} {value}' for name, value in machine.items())}")
    problems = 0
    for stage in (stage for stage in STAGES if stage in options.stage):
        _CONSOLE.rule(stage)
        start = time.monotonic()
        deadline = Deadline.after(60 * options.minutes)
        known = known_outcomes(out / f"{stage}.json", label) if options.resume else {}
        bench = Bench(size, device, options.seed, out, watcher, deadline, _say, options.batch_size, known)
        found = run_stage(stage, bench)
        result = StageResult(
            stage=stage,
            size=size,
            label=label,
            emulated=device != "cuda",
            command=shlex.join(["python", "experiments/gpu_proof/prove.py", *words]),
            seed=options.seed,
            date=began.isoformat(timespec="seconds"),
            machine=machine,
            versions=all_versions(),
            seconds=time.monotonic() - start,
            problem=found.problem,
            outcomes=found.outcomes,
            facts=found.facts,
        )
        path = result.save(out)
        show(result, path)
        problems += bool(found.problem)
    return problems


def show(result: StageResult, path: Path) -> None:
    """Print a stage's tables, and its problem if it has one."""
    for grid in grids(result):
        _CONSOLE.print(_table(grid, result.label))
        _CONSOLE.print(grid.note, style="dim", highlight=False)
    if result.problem:
        _CONSOLE.print(f"{result.stage} is not whole: {result.problem}", style="bold red", markup=False)
    _CONSOLE.print(f"{result.stage}: {result.seconds:.0f} s, {path}", highlight=False)


def _table(grid: Grid, label: str) -> Table:
    table = Table(title=f"{grid.title} ({label})", title_justify="left")
    for column in grid.columns:
        table.add_column(column, overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def _say(line: str) -> None:
    _CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


def _device() -> str:
    """Return the best device of this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    from tests import emu

    try:
        emu.load()
    except emu.EmuUnavailable as reason:
        _CONSOLE.print(f"no CUDA device, and no emulated one: {reason}", markup=False)
        return "cpu"
    return "emu"


def _machine(device: str) -> dict[str, str]:
    """Describe the machine, from a process that may open the device: this one never does."""
    with tempfile.TemporaryDirectory() as logs:
        outcome = Watcher(device, Path(logs)).run(Job("facts", "tiny", device), Deadline.after(120))
    facts = {name: str(value) for name, value in outcome.report.items()}
    driver = DriverView().driver if device == "cuda" else None
    return {**facts, **({"driver": driver} if driver else {})}


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
