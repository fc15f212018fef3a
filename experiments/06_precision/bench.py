"""Host bytes per parameter by kind, and bytes on the link per step, by the dtypes of weights, wire and masters.

Emulation: there is no accelerator, the host copies to itself. Bytes are real: the report's, and those by which the
process has grown. Each setting trains in a process of its own. About speed only the rate of casts is measured.
Run from the repository: ``make bench``, or ``python experiments/06_precision/bench.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy, attach
from lightning_superpipe.engine.casting import cast_into
from lightning_superpipe.observe.report import Report
from lightning_superpipe.observe.trace import software_versions

HERE = Path(__file__).resolve().parent
SEED, NUM_BLOCKS, WIDTH, NUM_STEPS = 1, 24, 512, 4
WINDOW: dict[str, Any] = {"k": 2, "k_prime": 1, "link": {}}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, wire bfloat16": {"wire_dtype": "bfloat16"},
    "bfloat16, masters": {"master_weights": "float32"},
    "bfloat16": {},
    "float32, in backward": {},
    "bfloat16, masters, in backward": {"master_weights": "float32"},
}


class Block(nn.Module):
    """Two matrices and their residual, shape (N, WIDTH) -> (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.gelu(self.up(x)))
        return x + down


class Training(L.LightningModule):
    """The same for Lightning's Trainer, which lets units be updated in backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.resident_bytes = 0

    def training_step(self, batch: Tensor) -> Tensor:
        self.resident_bytes = psutil.Process().memory_info().rss
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The same loss for every loop."""
    loss: Tensor = model(batch).float().pow(2).mean()
    return loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for every loop."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def run_loop(model: nn.Module, batches: list[Tensor], options: dict[str, Any]) -> tuple[Report, int]:
    """Train in a plain loop; return the report, and the resident bytes of the process."""
    optimizer = optimizer_of(model)
    with attach(model, optimizer, device="cpu", update="after_backward", **WINDOW, **options) as pipe:
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return pipe.report(), psutil.Process().memory_info().rss


def run_trainer(model: nn.Module, batches: list[Tensor], options: dict[str, Any]) -> tuple[Report, int]:
    """Train with Lightning, and no callback that could look at gradients; the bytes are those of the last step."""
    strategy = SuperpipeStrategy(update="in_backward", **WINDOW, **options)
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", max_epochs=1, enable_model_summary=False, **off)
    training = Training(model)
    trainer.fit(training, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return strategy.report(), training.resident_bytes


def train(name: str) -> dict[str, Any]:
    """Train one setting in this process; return its bytes."""
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    warm = nn.Linear(8, 8).to(dtype)  # libraries take their memory before it is measured
    warm(torch.ones(2, 8, dtype=dtype)).sum().backward()
    before = psutil.Process().memory_info().rss
    model = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS))).to(dtype)
    run = run_trainer if name.endswith("in backward") else run_loop
    report, resident_bytes = run(model, [torch.randn(4, WIDTH, dtype=dtype) for _ in range(NUM_STEPS)], SETTINGS[name])
    grown = resident_bytes - before
    step = report.last_step
    return {
        "setting": name,
        "num_parameters": report.num_parameters,
        "host_bytes": report.host._asdict(),
        "process_grew_bytes": grown,
        "slot_bytes": report.peak.slots,
        "h2d_bytes_per_step": step.h2d_bytes,
        "d2h_bytes_per_step": step.d2h_bytes,
        "loads_per_step": step.num_loads,
    }


def cast_rate() -> dict[str, float]:
    """Casts per second by one thread, the best of five, 10^9 elements."""
    wide, narrow = torch.randn(1 << 25), torch.empty(1 << 25, dtype=torch.bfloat16)

    def best(target: Tensor, source: Tensor) -> float:
        def once() -> float:
            start = time.perf_counter()
            cast_into(target, source)
            return time.perf_counter() - start

        return target.numel() / min(once() for _ in range(5)) / 1e9

    return {"float32 to bfloat16": best(narrow, wide), "bfloat16 to float32": best(wide, narrow)}


def show(rows: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Print the table of the page."""
    kinds = ("weights", "staging", "gradients", "states")
    table = Table("setting", *kinds, "host", "process grew", "slots", "h2d / step", "d2h / step")
    for row in rows:
        per = [row["host_bytes"][kind] / row["num_parameters"] for kind in kinds]
        others = ("process_grew_bytes", "slot_bytes", "h2d_bytes_per_step", "d2h_bytes_per_step")
        shares = [*per, sum(per), *(row[name] / row["num_parameters"] for name in others)]
        table.add_row(row["setting"], *(f"{share:.2f}" for share in shares))
    console = Console(width=140)
    console.print("bytes per parameter")
    console.print(table)
    for name, rate in rates.items():
        console.print(f"{name}: {rate:.2f} * 10^9 elements/s by one thread")


def main() -> None:
    """Run all settings, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--setting", choices=list(SETTINGS), help="train this one only, and print its numbers")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.setting:
        print(json.dumps(train(options.setting)))
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--setting"]
    runs = [subprocess.run([*command, name], check=True, capture_output=True, text=True) for name in SETTINGS]
    rows, rates = [json.loads(run.stdout.splitlines()[-1]) for run in runs], cast_rate()
    show(rows, rates)
    machine = {"device": "cpu (emulation)", "cores": os.cpu_count(), "platform": platform.platform()}
    sizes = {"num_blocks": NUM_BLOCKS, "width": WIDTH, "num_steps": NUM_STEPS, "window": WINDOW}
    result = {
        "command": "python experiments/06_precision/bench.py",
        "seed": SEED,
        "machine": machine,
        "versions": software_versions(),
        "model": sizes,
        "rows": rows,
        "casts_per_second_1e9": rates,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{platform.machine()}-{os.cpu_count()}cores-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
