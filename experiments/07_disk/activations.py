"""Activations in files beyond a memory limit: the pace of a step, and what requests gain over the files' mapping.

Run from the repository: ``python experiments/07_disk/activations.py``; Linux, about six gigabytes of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from limits import limit_memory, run_worker
from rates import measure, plain_rates
from records import write_down
from torch import Tensor, nn
from work import traffic

from lightning_superpipe import attach
from lightning_superpipe.config import Disk
from lightning_superpipe.tiers import DiskTier, Folder
from lightning_superpipe.tiers.host import HostSlab
from lightning_superpipe.tiers.requests import Requests

HERE = Path(__file__).resolve().parent
MIB = 2**20
WIDTH, HIDDEN, SLAB_BYTES = 128, 512, 8 * MIB


class Block(nn.Module):
    """A residual block; each product saves one more activation, and computes next to nothing."""

    def __init__(self, num_products: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.num_products = num_products

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        for _ in range(self.num_products):
            hidden = hidden * hidden
        result: Tensor = x + self.down(hidden)
        return result


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps, with activations in files or as they are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(job["products"]) for _ in range(job["blocks"])))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(job["rows"], WIDTH)
    options = {"activations": "offload", "store": {"activations": "disk"}, "k": 2, "device": "cpu"}
    took = []
    with attach(model, optimizer, **options) if job["limit"] else contextlib.nullcontext() as pipe:
        by = limit_memory(job["limit"]) if job["limit"] else "none"
        for _ in range(job["steps"]):
            before = traffic(pipe)
            start = time.perf_counter()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            took.append(time.perf_counter() - start)
            moved = [now - then for now, then in zip(traffic(pipe), before, strict=True)]
    sums = [parameter.double().sum().item() for parameter in model.parameters()]
    return {"step_seconds": took, "moved": moved, "sums": [*sums, loss.item()], "limit_by": by}


def compare(job: dict[str, Any]) -> dict[str, float]:
    """Write pieces and read them back, last one first: by the mapping, and by requests; return seconds of each."""
    options = Disk(folder=job["folder"])
    folder, requests = Folder(options), Requests(options.requests)
    tier, count = DiskTier("activations", folder, requests, options), job["bytes"] // SLAB_BYTES
    tier.reserve([SLAB_BYTES] * count)
    source, target = (HostSlab(SLAB_BYTES, pin=False).bytes.fill_(number) for number in (1, 2))
    limit_memory(job["limit"])
    found: dict[str, list[float]] = {"mapping": [], "requests": []}
    for _ in range(job["rounds"] + 1):
        for way, taken in found.items():
            slabs = [tier.allocate(SLAB_BYTES) for _ in range(count)]
            start = time.perf_counter()
            for slab in slabs:
                slab.store(source) if way == "requests" else slab.bytes.copy_(source)
            for slab in reversed(slabs):
                slab.fetch(target) if way == "requests" else target.copy_(slab.bytes)
            taken.append(time.perf_counter() - start)
            for slab in slabs:
                slab.close()
    tier.close()
    requests.close()
    folder.close()
    return {way: statistics.median(taken[1:]) for way, taken in found.items()}


def run(work: str, job: dict[str, Any]) -> Any:
    """Do a job in a process of its own."""
    return run_worker(__file__, "--work", work, json.dumps(job))


def pace(options: argparse.Namespace, folder: Path, products: int) -> dict[str, Any]:
    """Time steps in files against the ordinary ones, and against what the disk needs for their bytes."""
    job = {name: getattr(options, name) for name in ("blocks", "rows", "steps")} | {"products": products, "limit": 0}
    limited = job | {"limit": options.limit_mib * MIB}
    ordinary, rates = [run("train", job)], [measure(folder, SLAB_BYTES, 48, 2)]
    stored = run("train", limited)
    rates.append(measure(folder, SLAB_BYTES, 48, 2))
    ordinary.append(run("train", job))
    read, write = plain_rates(rates)
    compute = statistics.median([one for each in ordinary for one in each["step_seconds"][1:]])
    step = statistics.median(stored["step_seconds"][1:])
    disk = stored["moved"][0] / read + stored["moved"][1] / write
    row = {
        "products": products,
        "is_equal": all(each["sums"] == stored["sums"] for each in ordinary),
        "limit_by": stored["limit_by"],
        "read_bytes": stored["moved"][0],
        "written_bytes": stored["moved"][1],
        "step_s": step,
        "compute_s": compute,
        "disk_s": disk,
        "over": step / max(compute, disk),
    }
    print(
        f"{products} products: {row['written_bytes'] / MIB:.0f} MiB of activations, equal: {row['is_equal']}; step "
        f"{step:.2f} s, compute {compute:.2f} s, disk {disk:.2f} s: {row['over']:.2f} times the larger",
        flush=True,
    )
    return row


def main() -> None:
    """Measure, show, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--products", type=int, nargs="*", default=[0, 2], help="activations more in each block")
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="on a disk; a temporary one if left out")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    options = parser.parse_args()
    if options.work:
        print(json.dumps({"train": train, "compare": compare}[options.work[0]](json.loads(options.work[1]))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        job = {"folder": f"{made}/ways", "bytes": 1536 * MIB, "limit": options.limit_mib * MIB // 2, "rounds": 3}
        ways = run("compare", job)
        print(", ".join(f"{way}: {seconds:.2f} s" for way, seconds in ways.items()) + " for 1536 MiB there and back")
        rows = [pace(options, Path(made), products) for products in options.products]
    if options.out is not None:
        path = HERE / options.out / f"{platform.machine()}-activations-{date.today()}.json"
        write_down(path, "activations.py", options.folder, {"ways_s": ways, "pace": rows})
        print(path)


if __name__ == "__main__":
    main()
