"""How much host memory it takes to load, train, save, resume and export a large model, against the ordinary run.

Through Lightning's Trainer, a loop with Accelerate, and the Trainer of transformers (``--fronts``).
Every stage runs in a process of its own; the kernel's counter of the largest resident set is set back before what is
measured. Pages of mapped files count there as well, though the kernel takes them back when memory is short, so the
process's own memory (anonymous pages) is sampled beside it. Linux only.
Run from the repository: ``python experiments/03_big_models/bench.py``; about ten times the model's size is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from humanize import naturalsize
from memory import Memory
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from stages import FRONTS, STAGES, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_superpipe.observe.trace import software_versions

HERE = Path(__file__).resolve().parent
GIB = 2**30
WIDTH = 1024
WAYS = ("plain", "superpipe")


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


def main() -> None:
    """Run all stages both ways, show the peaks, and write them down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.2, help="size of the model's weights")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES)
    parser.add_argument("--fronts", nargs="*", default=tuple(FRONTS), choices=tuple(FRONTS))
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary one if left out")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    parser.add_argument("--one", nargs=4, metavar=("FRONT", "STAGE", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.one:
        front, stage, way, folder = options.one
        size = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        memory = Memory()
        FRONTS[front](stage, way, Path(folder), memory)
        print(json.dumps(memory.shares(3 * size if stage in ("save", "resume") else size)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_model(Path(folder) / "model", int(options.gib * GIB))
        rows = []
        for front, way in itertools.product(options.fronts, options.ways):
            for stage in options.stages:
                peaks = in_own_process(front, stage, way, Path(folder) / "model")
                rows.append({"front": front, "stage": stage, "way": way, **peaks})
            for written in Path(folder).glob(f"{way}*"):
                shutil.rmtree(written) if written.is_dir() else written.unlink()
    show(rows, size)
    if options.out is not None:
        print(save(rows, size, options))


def in_own_process(front: str, stage: str, way: str, folder: Path) -> dict[str, float]:
    """Run one stage where nothing ran before."""
    command = [sys.executable, __file__, "--one", front, stage, way, str(folder)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def show(rows: list[dict[str, Any]], size: int) -> None:
    """Print a table."""
    table = Table("front end", "stage", "way", "own memory, peak", "with file pages", "over the bytes at hand")
    for row in rows:
        sizes = [naturalsize(row[name], binary=True) for name in ("anonymous_bytes", "resident_bytes")]
        table.add_row(row["front"], row["stage"], row["way"], *sizes, f"{row['share']:.3f}")
    Console(width=120).print(table)
    print(f"the model's weights are {naturalsize(size, binary=True)}")


def save(rows: list[dict[str, Any]], size: int, options: argparse.Namespace) -> Path:
    """Write the numbers and where they come from."""
    folder: Path = HERE / options.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{platform.machine()}-{naturalsize(size, binary=True).replace(' ', '')}-{date.today()}.json"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    place = ["--folder", str(options.folder)]  # is this machine's business
    command = ["python", "experiments/03_big_models/bench.py", *(word for word in sys.argv[1:] if word not in place)]
    result = {
        "command": " ".join(command),
        "machine": {"cores": os.cpu_count(), "memory_bytes": memory, "platform": platform.platform()},
        "versions": software_versions()
        | {name: version(name) for name in ("accelerate", "safetensors", "transformers")},
        "model_bytes": size,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
