"""How much device memory training takes, by k, on the emulated device: its own byte counter, against the ordinary run.

Memory is counted exactly there, by a real allocator with a separate memory; nothing about speed can be said.
Run from the repository: ``make bench``, or ``python experiments/02_device_memory/bench.py``. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from humanize import naturalsize
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the emulated device is a fixture of the tests, not part of the package

from lightning_superpipe import SuperpipeStrategy  # noqa: E402
from lightning_superpipe.observe.trace import software_versions  # noqa: E402
from tests import emu  # noqa: E402

WINDOWS = (1, 2, 3, 6)
SEED = 1


class Module(L.LightningModule):
    """GPT-2 with 24 blocks of width 128, as small as keeps the proportions of a large one."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=24, n_head=4)
        self.net: Any = GPT2LMHeadModel(config).train()
        if checkpointing:
            self.net.gradient_checkpointing_enable()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)


def train(strategy: Any, *, checkpointing: bool, length: int) -> dict[str, Any]:
    """Train three steps; return bytes and weights."""
    gc.collect()
    L.seed_everything(SEED, verbose=False)
    module = Module(checkpointing)
    generator = torch.Generator().manual_seed(SEED)
    data = DataLoader([torch.randint(3, 500, (2, length), generator=generator) for _ in range(3)], batch_size=None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    emu.reset_peak()
    before = emu.used_bytes()
    trainer = L.Trainer(devices=1, max_epochs=1, accelerator=emu.EmuAccelerator(), strategy=strategy, **quiet)
    trainer.fit(module, data)
    peak = emu.peak_bytes() - before
    return {"peak_bytes": peak, "weights": [value.cpu().clone() for value in module.state_dict().values()]}


def compare(checkpointing: bool, length: int) -> list[dict[str, Any]]:
    """Train without and with streaming; return one row each."""
    plain = train(SingleDeviceStrategy("emu:0"), checkpointing=checkpointing, length=length)
    setting = {"checkpointing": checkpointing, "length": length}
    rows = [{**setting, "k": None, "peak_bytes": plain["peak_bytes"], "saving": 0.0, "equal": True}]
    for k in WINDOWS:
        run = train(SuperpipeStrategy(k=k), checkpointing=checkpointing, length=length)
        equal = all(torch.equal(one, other) for one, other in zip(plain["weights"], run["weights"], strict=True))
        saving = 1 - run["peak_bytes"] / plain["peak_bytes"]
        rows.append({**setting, "k": k, "peak_bytes": run["peak_bytes"], "saving": saving, "equal": equal})
    return rows


def main() -> None:
    """Run all settings, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    emu.load()
    rows = [row for checkpointing in (False, True) for length in (4, 32) for row in compare(checkpointing, length)]
    table = Table("checkpointing", "tokens", "k", "peak", "saving", "weights equal")
    for row in rows:
        name = "ordinary run" if row["k"] is None else str(row["k"])
        size = naturalsize(row["peak_bytes"], binary=True, format="%.2f")
        table.add_row(
            str(row["checkpointing"]), str(2 * row["length"]), name, size, f"{row['saving']:.1%}", str(row["equal"])
        )
    Console(width=100).print(table)
    out.mkdir(parents=True, exist_ok=True)
    machine = {"device": "emulated (emu:0)", "cores": os.cpu_count(), "platform": platform.platform()}
    result = {"command": "make bench", "seed": SEED, "machine": machine, "versions": software_versions(), "rows": rows}
    path = out / f"emulated-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
