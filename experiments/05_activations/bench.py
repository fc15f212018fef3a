"""Activations kept, recomputed, offloaded, in micro-batches: peak bytes, traffic and step time behind an emulated link.

Run from the repository: ``python experiments/05_activations/bench.py --out experiments/05_activations/results``. Bytes
are counted exactly; times are those of the CPU behind a throttled link, and say nothing about an accelerator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from humanize import naturalsize
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_superpipe import Link, SuperpipeConfig
from lightning_superpipe.observe.trace import software_versions
from lightning_superpipe.session import Session

SEED, LENGTH, VOCABULARY = 1, 64, 256
NUM_COUNTED = 2  # steps in which bytes are counted operation by operation; they are not timed
LINK = Link(h2d_gb_s=0.2, d2h_gb_s=0.2, latency_ms=0.05)
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One row: a policy, and a batch in so many parts."""

    name: str
    activations: str
    micro_batches: int
    num_samples: int


def settings() -> list[Setting]:
    """Return the policies at one batch, and micro-batches at a batch that grows with them."""
    policies = [Setting(name, name, 1, 32) for name in ("keep", "offload", "recompute")]
    parts = [Setting(f"recompute, m={m}", "recompute", m, 32) for m in (2, 4, 8)]
    growing = [Setting(f"m={m}, {4 * m} samples", "recompute", m, 4 * m) for m in (1, 2, 4, 8)]
    return policies + parts + growing


def model() -> Any:
    """Return a GPT-2 of eight blocks of width 128; the same weights each time."""
    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=8, n_head=4)
    return GPT2LMHeadModel(config).train()


def measure(setting: Setting, num_steps: int) -> dict[str, Any]:
    """Train a few steps; return bytes, times and the last loss."""
    gc.collect()
    net = model()
    config = SuperpipeConfig(
        k=2, activations=setting.activations, micro_batches=setting.micro_batches, link=LINK, units=["GPT2Block"]
    )
    session = Session(net, config, DEVICE, trains=True, owns_root=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    seconds, loss = [], 0.0
    for step in range(NUM_COUNTED + num_steps):
        ids = torch.randint(0, VOCABULARY, (setting.num_samples, LENGTH), generator=generator)
        start = time.perf_counter()
        with session.step("train"):
            output = net(input_ids=ids, labels=ids, use_cache=False).loss
        output.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= NUM_COUNTED:
            seconds.append(time.perf_counter() - start)
        loss = output.item()
        del output
    session.close()
    report = session.report()
    return {
        **asdict(setting),
        "peak_activation_bytes": report.peak.activations,
        "h2d_bytes_per_sample": report.last_step.h2d_bytes / setting.num_samples,
        "d2h_bytes_per_sample": report.last_step.d2h_bytes / setting.num_samples,
        "stall_seconds": report.last_step.stall_seconds,
        "step_seconds": seconds,
        "last_loss": loss,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as people read them."""
    table = Table("setting", "samples", "peak activations", "H2D per sample", "D2H per sample", "step", "last loss")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["num_samples"]),
            naturalsize(row["peak_activation_bytes"], binary=True, format="%.2f"),
            naturalsize(row["h2d_bytes_per_sample"], binary=True, format="%.1f"),
            naturalsize(row["d2h_bytes_per_sample"], binary=True, format="%.1f"),
            f"{1e3 * statistics.median(row['step_seconds']):.0f} ms",
            f"{row['last_loss']:.7f}",
        )
    return table


def main() -> None:
    """Run all settings, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; none is written without")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [measure(setting, options.steps) for setting in settings()]
    Console(width=120).print(table_of(rows))
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"device": "cpu (emulated link)", "cores": os.cpu_count(), "platform": platform.platform()}
    link = asdict(LINK)
    result = {"command": "bench.py --out results", "seed": SEED, "link": link, "machine": machine, "rows": rows}
    path = options.out / f"{platform.machine()}-{os.cpu_count()}cores-{date.today().isoformat()}.json"
    path.write_text(json.dumps({**result, "versions": software_versions()}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
