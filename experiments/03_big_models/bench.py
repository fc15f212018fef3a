"""How much host memory it takes to load, train, save, resume and export a large model, against the ordinary run.

Every stage runs in a process of its own; the kernel's counter of the largest resident set is set back before what is
measured. Pages of mapped files count there as well, though the kernel takes them back when memory is short, so the
process's own memory (anonymous pages) is sampled beside it. Linux only.
Run from the repository: ``python experiments/03_big_models/bench.py``; about ten times the model's size is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from humanize import naturalsize
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.observe.trace import software_versions

HERE = Path(__file__).resolve().parent
GIB = 2**30
WIDTH, VOCABULARY, TOKENS = 1024, 4096, 16
STAGES = ("load", "save", "resume", "export")


class Memory:
    """Peaks of this process since :meth:`measure` began, bytes."""

    @contextmanager
    def measure(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set counts from here
        self.before, self.peak_anonymous = _status("RssAnon"), 0
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(stop,), daemon=True)
        sampler.start()
        yield
        stop.set()
        sampler.join()
        self.peak_resident = _status("VmHWM")

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(2e-3):
            self.peak_anonymous = max(self.peak_anonymous, _status("RssAnon"))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not tell {name} of a process")


class Pretrained(L.LightningModule):
    """A causal language model from a folder, loaded where Lightning says."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = LlamaForCausalLM.from_pretrained(self.folder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits: Tensor = self.net(input_ids=batch, use_cache=False).logits
        return logits.argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


def write_model(folder: Path, num_bytes: int) -> int:
    """Write a folder as ``save_pretrained`` does, one layer at a time; return its bytes."""
    layer = 4 * (4 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH + 2 * WIDTH)
    config = LlamaConfig(
        num_hidden_layers=max(1, round(num_bytes / layer)),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=WIDTH // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    index: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for number, names in enumerate(groups.values()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        save_file({name: torch.randn(shapes[name]) * 0.02 for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = 4 * sum(shape.numel() for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def run_stage(stage: str, way: str, folder: Path, num_bytes: int) -> dict[str, float]:
    """Do one stage; return its peaks, see :func:`_share`."""
    strategy: Any = SuperpipeStrategy(k=2) if way == "superpipe" else "auto"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=1, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(torch.randint(VOCABULARY, (2, TOKENS)), batch_size=1)
    module, memory, file = Pretrained(folder), Memory(), folder.parent / f"{way}.ckpt"
    if stage == "load":
        with memory.measure():
            trainer.predict(module, data)
        return _share(memory, num_bytes)
    if stage == "resume":
        with memory.measure():
            trainer.fit(module, data, ckpt_path=file)  # which has made all its steps already
        return _share(memory, 3 * num_bytes)
    trainer.fit(module, data)
    with memory.measure():
        if stage == "save":
            trainer.save_checkpoint(file)
        else:
            module.net.save_pretrained(folder.parent / f"{way}_export")
    return _share(memory, 3 * num_bytes if stage == "save" else num_bytes)


def _share(memory: Memory, num_bytes: int) -> dict[str, float]:
    """Peaks above what was held before, bytes, and the first as a share of the bytes at hand."""
    anonymous, resident = memory.peak_anonymous - memory.before, memory.peak_resident - memory.before
    return {"anonymous_bytes": anonymous, "resident_bytes": resident, "share": anonymous / num_bytes}


def main() -> None:
    """Run all stages both ways, show the peaks, and write them down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.2, help="size of the model's weights")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES)
    parser.add_argument("--ways", nargs="*", default=("plain", "superpipe"), choices=("plain", "superpipe"))
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary one if left out")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.one:
        stage, way, folder = options.one
        size = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        print(json.dumps(run_stage(stage, way, Path(folder), size)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_model(Path(folder) / "model", int(options.gib * GIB))
        rows = [
            {"stage": stage, "way": way, **in_own_process(stage, way, Path(folder) / "model")}
            for stage in options.stages
            for way in options.ways
        ]
    show(rows, size)
    if options.out is not None:
        print(save(rows, size, options))


def in_own_process(stage: str, way: str, folder: Path) -> dict[str, float]:
    """Run one stage where nothing ran before."""
    command = [sys.executable, __file__, "--one", stage, way, str(folder)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def show(rows: list[dict[str, Any]], size: int) -> None:
    """Print a table."""
    table = Table("stage", "way", "own memory, peak", "with file pages", "over the bytes at hand")
    for row in rows:
        sizes = [naturalsize(row[name], binary=True) for name in ("anonymous_bytes", "resident_bytes")]
        table.add_row(row["stage"], row["way"], *sizes, f"{row['share']:.3f}")
    Console(width=120).print(table)
    print(f"the model's weights are {naturalsize(size, binary=True)}")


def save(rows: list[dict[str, Any]], size: int, options: argparse.Namespace) -> Path:
    """Write the numbers and where they come from."""
    folder: Path = HERE / options.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{platform.machine()}-{naturalsize(size, binary=True).replace(' ', '')}-{date.today()}.json"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "command": " ".join(["python", "experiments/03_big_models/bench.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "memory_bytes": memory, "platform": platform.platform()},
        "versions": software_versions(),
        "model_bytes": size,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
