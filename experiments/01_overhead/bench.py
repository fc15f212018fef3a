"""What streaming costs where nothing needs to be streamed: step times of plain Lightning and of several windows.

Contenders run one after the other in one process, in rounds, each time with a new trainer and the same module, data and
seed. A step's time is the time between the starts of two training steps, so it holds the whole loop: forward, backward,
gradient return, optimizer, Lightning itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.observe.trace import software_versions

VOCABULARY = 256
SEED = 0
PLAIN = "plain"


@dataclass
class Contender:
    """One way to train, and what it took.

    Attributes:
        k: window in units; None trains without the strategy.
        wall_ms: of each step after warm-up, one list a round.
        cpu_ms: processor time of all threads, likewise; other processes on the machine disturb it less.
        loads: units copied to the device in one step.
        unit_overhead_us: the engine's own time for each use of a unit, one figure a round.
        last_loss: of the last round; equal for all contenders, or they did not do the same work.
    """

    name: str
    k: int | None
    wall_ms: list[list[float]] = field(default_factory=list)
    cpu_ms: list[list[float]] = field(default_factory=list)
    loads: int = 0
    num_units: int = 0
    unit_overhead_us: list[float] = field(default_factory=list)
    last_loss: float = 0.0

    def ratios(self, plain: Contender, kind: str = "wall_ms") -> list[float]:
        """Median step of each round over the median step of plain training in the same round."""
        pairs = zip(getattr(self, kind), getattr(plain, kind), strict=True)
        return [statistics.median(mine) / statistics.median(others) for mine, others in pairs]


class TimedGPT(L.LightningModule):
    """A small GPT-2 that notes when its steps start; it has no hooks, so that the engine sees an ordinary module."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=options.tokens,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.width // 64,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.net = GPT2LMHeadModel(config)
        self.starts: list[tuple[float, float]] = []
        self.last_loss = torch.zeros(())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.starts.append((time.perf_counter(), time.process_time()))
        logits = self.net(batch[:, :-1], use_cache=False).logits
        self.last_loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return self.last_loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs")
    parser.add_argument("--steps", type=int, default=12, help="measured steps in a run")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them; the first two measure memory")
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4], help="further windows k, for information")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text in a batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch's kernels")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    return parser.parse_args()


def main() -> None:
    """Run all contenders in rounds, show what they took, and write it down if asked to."""
    options = parse()
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    windows = [Contender(f"k = {k}", k) for k in options.windows]
    contenders = [Contender(PLAIN, None), Contender("k = n", options.layers + 9), *windows]
    loads: list[float] = [os.getloadavg()[0]]
    for number in range(options.rounds):
        for place in range(len(contenders)):
            # Each round starts with another one: a drift of the machine then favours nobody.
            run(contenders[(place + number) % len(contenders)], options)
        loads.append(os.getloadavg()[0])
        print(f"round {number + 1} of {options.rounds} is done, load average {loads[-1]:.1f}", flush=True)
    show(contenders, loads)
    if options.out is not None:
        print(save(contenders, loads, options))


def run(contender: Contender, options: argparse.Namespace) -> None:
    """Train once and note the times."""
    L.seed_everything(SEED, verbose=False)
    module = TimedGPT(options)
    num_steps = options.warm_up + options.steps + 1  # the last step has no end that is seen
    texts: Any = torch.randint(VOCABULARY, (num_steps * options.batch_size, options.tokens + 1))
    strategy = "auto" if contender.k is None else SuperpipeStrategy(k=contender.k)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(texts, batch_size=options.batch_size))
    contender.last_loss = module.last_loss.item()
    for kind, times in enumerate((contender.wall_ms, contender.cpu_ms)):
        starts = [start[kind] for start in module.starts[options.warm_up :]]
        times.append([1e3 * (end - start) for start, end in itertools.pairwise(starts)])
    if isinstance(strategy, SuperpipeStrategy):
        report = strategy.report()
        contender.loads, contender.num_units = report.last_step.num_loads, report.num_units
        contender.unit_overhead_us.append(report.unit_overhead_us)


def show(contenders: list[Contender], loads: list[float]) -> None:
    """Print a table; the ratios are of medians within one round."""
    plain = contenders[0]
    table = Table("", "step, ms", "over plain", "rounds", "processor time", "added to a use of a unit", "engine alone")
    for contender in contenders:
        ratios, cpu = contender.ratios(plain), contender.ratios(plain, "cpu_ms")
        step = median_of_all(contender.wall_ms)
        added = (step - median_of_all(plain.wall_ms)) * 1e3 / max(2 * contender.num_units, 1)
        own = statistics.median(contender.unit_overhead_us) if contender.unit_overhead_us else None
        table.add_row(
            contender.name,
            f"{step:.1f}",
            f"{statistics.median(ratios) - 1:+.1%}",
            f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}",
            f"{statistics.median(cpu) - 1:+.1%}",
            "" if own is None else f"{added:.0f} us",
            "" if own is None else f"{own:.0f} us",
        )
    Console(width=120).print(table)
    same = len({contender.last_loss for contender in contenders}) == 1
    print(f"last losses are {'equal' if same else 'NOT EQUAL'}; load average {min(loads):.1f} to {max(loads):.1f}")


def median_of_all(rounds: list[list[float]]) -> float:
    """Return the median over all rounds together."""
    return statistics.median(value for times in rounds for value in times)


def save(contenders: list[Contender], loads: list[float], options: argparse.Namespace) -> Path:
    """Write the raw numbers and where they come from."""
    machine = f"{platform.machine()}-{os.cpu_count()}cores"
    folder: Path = Path(__file__).resolve().parent / options.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine}-{options.threads}threads-{date.today()}.json"
    result = {
        "command": " ".join(["python", "experiments/01_overhead/bench.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "device": "cpu (emulated device)", "platform": platform.platform()},
        "load_average": loads,
        "versions": software_versions(),
        "seed": SEED,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "contenders": [asdict(contender) for contender in contenders],
    }
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
