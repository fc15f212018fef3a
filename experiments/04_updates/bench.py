"""How much of the optimizer's step, and of the copies, is hidden: step times against their lower bound.

The device is emulated: its compute takes as long as it is told to and leaves the host's processors free meanwhile, as a
GPU does; copies take as long as a link of the given rate needs. The optimizer is real: torch's AdamW on real
weights, on the host. So the figures tell how well the four lanes overlap, not how fast any machine is.

The bound of a step is the busiest lane: max(compute, copies to the device, copies home, updates on the host).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_superpipe import attach
from lightning_superpipe.config import Link
from lightning_superpipe.observe.trace import Lane, software_versions

SEED = 0
WARM_UP = 3
LARGEST = 1 << 22
"""Elements of a weight at most, so that the allocator of the host keeps what kernels free."""


class Compute(torch.autograd.Function):
    """Computes nearly nothing, but takes a time in forward and twice as long in backward, whatever the host needs."""

    @staticmethod
    def forward(ctx: Any, seconds: float, x: Tensor, *weights: Tensor) -> Tensor:
        deadline = time.perf_counter() + seconds
        ctx.seconds = seconds
        ctx.save_for_backward(*weights)
        y = x + weights[-1][:4]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        deadline = time.perf_counter() + 2 * ctx.seconds
        own = [torch.full_like(weight, 1e-3) for weight in ctx.saved_tensors]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return None, gradients[0], *own


class Block(nn.Module):
    """Large weights, and a time in place of what a device would compute with them."""

    def __init__(self, num_parameters: int, seconds: float) -> None:
        super().__init__()
        sizes = torch.ones(num_parameters).split(LARGEST)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(len(each)) * 1e-3) for each in sizes)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Compute.apply(self.seconds, x, *self.weights)
        return y


@dataclass
class Setting:
    """One kind of bottleneck.

    Attributes:
        forward_ms: of one unit; backward takes twice as long.
        gb_s: of the link, each way, 10^9 bytes per second.
        num_parameters: of one unit, float32.
    """

    name: str
    forward_ms: float
    gb_s: float
    num_parameters: int


@dataclass
class Result:
    """One run; times are medians over steps, in milliseconds.

    Attributes:
        lanes_ms: what each lane works in one step.
        bound_ms: the busiest of them.
        floor_ms: what no order of the same work beats, because weights change between backward and forward: the busiest
            lane of the forward, and then that of the backward.
    """

    setting: str
    update: str
    clip: bool
    k: int
    k_prime: int
    on_device: float
    num_units: int
    step_ms: float
    lanes_ms: dict[str, float]
    bound_ms: float
    floor_ms: float
    all_ms: list[float]
    last_loss: float


def settings(update_ms: float, num_parameters: int) -> list[Setting]:
    """Settings around the time that this host needs for the update of one unit."""
    num_bytes = 4 * num_parameters
    per_ms = num_bytes / 1e6  # GB/s that carry a unit in one millisecond
    return [
        Setting("compute-bound", 2 * update_ms, per_ms / (0.5 * update_ms), num_parameters),
        Setting("balanced", update_ms, per_ms / (1.25 * update_ms), num_parameters),
        Setting("balanced by pass", update_ms, per_ms / update_ms, num_parameters),
        Setting("transfer-bound", update_ms, per_ms / (3 * update_ms), num_parameters),
        Setting("fast link", update_ms, per_ms / (0.5 * update_ms), num_parameters),
    ]


@dataclass(frozen=True)
class Case:
    """What is run in a setting; ``update="none"`` leaves the optimizer out.

    Attributes:
        on_device: share of the units that are updated on the device.
    """

    update: str = "after_backward"
    clip: bool = True
    k: int = 3
    k_prime: int = 1
    on_device: float = 0.0


def run(setting: Setting, case: Case, *, num_units: int, num_steps: int) -> Result:
    """Train, and return what a step took."""
    torch.manual_seed(SEED)
    update = case.update
    model = nn.Sequential(*(Block(setting.num_parameters, setting.forward_ms / 1e3) for _ in range(num_units)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    times: list[float] = []
    recorded = WARM_UP + num_steps
    options: dict[str, Any] = {
        "k": case.k,
        "k_prime": case.k_prime,
        "update_on_device": case.on_device,
        "update": "after_backward" if update == "none" else update,
        "link": Link(h2d_gb_s=setting.gb_s, d2h_gb_s=setting.gb_s),
        "units": "Block",
        "record_step": recorded,
    }
    pipe = attach(model, optimizer, device="cpu", **options)
    with pipe:
        for _ in range(recorded + 2):
            start = time.perf_counter()
            loss = model(torch.ones(4)).sum()
            loss.backward()
            if case.clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if update != "none":
                optimizer.step()
            optimizer.zero_grad()
            times.append((time.perf_counter() - start) * 1e3)
        assert pipe.recording is not None
        lanes = {lane.value: pipe.recording.busy_seconds(lane) * 1e3 for lane in Lane}
        updates = [span.seconds for span in pipe.recording.lane(Lane.HOST) if span.name == "U"]
    lanes["compute"] = 3 * num_units * setting.forward_ms
    lanes["host"] = sum(updates) * 1e3
    kept, bound = times[WARM_UP:recorded], max(lanes.values())
    load_ms, forward_ms = 4e-6 * setting.num_parameters / setting.gb_s, num_units * setting.forward_ms
    floor = max(forward_ms, num_units * load_ms) + max(2 * forward_ms, num_units * load_ms)
    median, last_loss = statistics.median(kept), loss.item()
    return Result(
        setting.name,
        **asdict(case),
        num_units=num_units,
        step_ms=median,
        lanes_ms=lanes,
        bound_ms=bound,
        floor_ms=floor,
        all_ms=kept,
        last_loss=last_loss,
    )


def update_time(num_parameters: int) -> float:
    """Milliseconds that this host needs to update one unit."""
    weight = nn.Parameter(torch.randn(num_parameters))
    weight.grad = torch.randn(num_parameters)
    optimizer, times = torch.optim.AdamW([weight], foreach=False), []
    for _ in range(60):
        start = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[len(times) // 2 :])


def show(results: list[Result]) -> None:
    """Print a row for each run, as Markdown."""
    columns = (
        "setting",
        "update",
        "clipped",
        "k, k'",
        "on device",
        "compute, h2d, d2h, host",
        "step",
        "/ bound",
        "/ floor",
    )
    table = Table(*columns, box=box.MARKDOWN)
    for each in results:
        table.add_row(
            each.setting,
            each.update,
            "yes" if each.clip else "no",
            f"{each.k}, {each.k_prime}",
            f"{each.on_device:.0%}",
            ", ".join(f"{each.lanes_ms[lane]:.0f}" for lane in ("compute", "h2d", "d2h", "host")),
            f"{each.step_ms:.0f} ms",
            f"{each.step_ms / each.bound_ms:.2f}",
            f"{each.step_ms / each.floor_ms:.2f}",
        )
    Console(width=160).print(table)


def hidden(results: list[Result]) -> list[str]:
    """Say how much of the update is hidden: what it adds to a step, against what it adds where nothing hides it."""
    results = [each for each in results if not each.on_device]
    by_key: dict[tuple[Any, ...], float] = {
        (each.setting, each.clip, each.k, each.k_prime, each.update): each.step_ms for each in results
    }
    lines = []
    for (*key, update), step_ms in by_key.items():
        none, whole = (by_key.get((*key, other)) for other in ("none", "at_once"))
        if update == "after_backward" and none is not None and whole is not None:
            share = 1 - (step_ms - none) / (whole - none)
            lines.append(
                f"{key[0]}, {'clipped' if key[1] else 'not clipped'}: {share:.0%} of {whole - none:.0f} ms are hidden"
            )
    return lines


def show_all(results: list[Result]) -> None:
    """Print a table, and what is hidden."""
    show(results)
    print("\n".join(hidden(results)))


WINDOWS = ((2, 1), (3, 1), (4, 2))
CASES = {
    "clipped": [Case(k=k, k_prime=k_prime) for k, k_prime in WINDOWS],
    "not-clipped": [Case(clip=False, k=k, k_prime=k_prime) for k, k_prime in WINDOWS],
    "hidden": [Case(update) for update in ("none", "after_backward", "at_once")],
    "device": [Case(), Case(on_device=0.1)],
}


def main() -> None:
    """Run all settings, print tables, and write results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1 << 20, help="of one unit, float32")
    parser.add_argument("--units", type=int, default=48, help="of the model")
    parser.add_argument("--settings", nargs="*", help="names of those to run; all by default")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="what to run in each of them")
    parser.add_argument("--update-ms", type=float, help="time for the update of one unit; measured by default")
    parser.add_argument("--steps", type=int, default=12, help="measured for each run")
    parser.add_argument("--show", type=Path, nargs="+", help="run nothing; print the tables of results files")
    parser.add_argument("--out", type=Path, help="folder beside this file for the raw numbers")
    args = parser.parse_args()
    if args.show:
        show_all([Result(**each) for path in args.show for each in json.loads(path.read_text())["results"]])
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    update_ms = args.update_ms or update_time(args.parameters)
    print(f"the update of one unit of {args.parameters:,} parameters takes {update_ms:.2f} ms on this host")
    cases = [case for name in args.cases for case in CASES[name]]
    results = []
    for setting in settings(update_ms, args.parameters):
        if not args.settings or setting.name in args.settings:
            results += [run(setting, case, num_units=args.units, num_steps=args.steps) for case in cases]
    show_all(results)
    if args.out is not None:
        folder = Path(__file__).resolve().parent / args.out
        folder.mkdir(parents=True, exist_ok=True)
        part = "".join(f"-{name.replace(' ', '-')}" for name in (*(args.settings or ()), *args.cases))
        path = folder / f"{platform.machine()}-{os.cpu_count()}cores-{date.today()}{part}.json"
        state = {
            "command": " ".join(["python", "experiments/04_updates/bench.py", *sys.argv[1:]]),
            "machine": {"cores": os.cpu_count(), "device": "cpu (emulated device)", "platform": platform.platform()},
            "versions": software_versions(),
            "seed": SEED,
            "update_ms": update_ms,
            "results": [asdict(each) for each in results],
        }
        path.write_text(json.dumps(state) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
