"""What streaming costs where nothing needs to be streamed: step times of plain Lightning and of several windows.

Each contender trains in a process of its own, with the same module, data and seed. They take turns: one makes a step
while the others wait, then the next. A drift of the machine, or a neighbour on it, then meets all of them alike; how
far two plain runs lie apart is shown as a control. A step is what lies between the starts of two training steps, so it
holds the whole loop: forward, backward, gradient return, optimizer, Lightning itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
SHARED: list[tuple[Turns, argparse.Namespace]] = []  # in each contender's process: one, from receive()


@dataclass
class Contender:
    """One way to train, and what it took.

    Attributes:
        options: of the strategy; None trains without it.
        wall_ms: of each step after warm-up, in order.
        cpu_ms: processor time of all threads, likewise.
        loads: units copied to the device in one step.
        unit_overhead_us: the engine's own time for each use of a unit.
        last_loss: equal for all contenders, or they did not do the same work.
    """

    name: str
    options: dict[str, Any] | None
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    loads: int = 0
    num_units: int = 0
    unit_overhead_us: float | None = None
    last_loss: float = 0.0

    def ratios(self, plain: Contender, kind: str = "wall_ms") -> list[float]:
        """Each step's time over that of the plain step of the same round."""
        return [mine / other for mine, other in zip(getattr(self, kind), getattr(plain, kind), strict=True)]


class Turns:
    """Lets one process at a time go on, in a fixed order, and times how long each keeps the turn."""

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._gates = [context.Semaphore(0) for _ in range(num_processes)]
        self._is_running = context.Array("b", [1] * num_processes)
        self._taken = (0.0, 0.0)
        self._gates[0].release()

    def take(self, place: int) -> None:
        """Block until it is this process's turn."""
        self._gates[place].acquire()
        self._taken = (time.perf_counter(), time.process_time())

    def pass_on(self, place: int, *, for_good: bool = False) -> tuple[float, float]:
        """Let the next process go on; return milliseconds and processor milliseconds of this turn."""
        start, cpu_start = self._taken
        took = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu_start)
        self._is_running[place] = not for_good
        order = [(place + step) % len(self._gates) for step in range(1, len(self._gates) + 1)]
        following = next((other for other in order if self._is_running[other]), None)
        if following is not None:
            self._gates[following].release()
        return took


class TimedGPT(L.LightningModule):
    """A small GPT-2 that gives its turn away at each step; it has no hooks: the engine sees an ordinary module."""

    def __init__(self, options: argparse.Namespace, give_turn_away: Callable[[], None]) -> None:
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
        self.give_turn_away = give_turn_away
        self.last_loss = torch.zeros(())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.give_turn_away()
        logits = self.net(batch[:, :-1], use_cache=False).logits
        self.last_loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return self.last_loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them; auto needs seven")
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4], help="further windows k, for information")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text in a batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch's kernels")
    parser.add_argument("--out", type=Path, help="folder for the result file, from this script's folder; none if left")
    return parser.parse_args()


def main() -> None:
    """Let all contenders train in turns, show what they took, and write it down if asked to."""
    options = parse()
    windows = [Contender(f"k = {k}", {"k": k}) for k in options.windows]
    control = Contender("plain again", None)  # how far two runs of the same thing lie apart
    auto = Contender("auto", {"device_memory": "16GiB"})  # all fits, so that it steps aside
    contenders = [Contender(PLAIN, None), control, auto, Contender("k = n", {"k": options.layers + 9}), *windows]
    load = os.getloadavg()[0]
    processes = ProcessPoolExecutor(
        len(contenders),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=receive,
        initargs=(Turns(len(contenders)), options),
    )
    with processes as pool:
        contenders = list(pool.map(run, contenders, range(len(contenders))))
    loads = [load, os.getloadavg()[0]]
    show(contenders, loads)
    if options.out is not None:
        print(save(contenders, loads, options))


def receive(turns: Turns, options: argparse.Namespace) -> None:
    """Keep what all contenders share, in a process that has just begun."""
    SHARED.append((turns, options))
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")


def run(contender: Contender, place: int) -> Contender:
    """Train once, in turns with the others, and note the times."""
    turns, options = SHARED[0]
    turns.take(place)

    def give_turn_away() -> None:
        wall_ms, cpu_ms = turns.pass_on(place)
        contender.wall_ms.append(wall_ms)
        contender.cpu_ms.append(cpu_ms)
        turns.take(place)

    try:
        train(contender, give_turn_away, options)
    finally:
        turns.pass_on(place, for_good=True)
    for times in (contender.wall_ms, contender.cpu_ms):
        del times[: 1 + options.warm_up]  # what came before the first step counts as one
    return contender


def train(contender: Contender, give_turn_away: Callable[[], None], options: argparse.Namespace) -> None:
    """Fit a fresh module on fixed random texts."""
    num_steps = options.warm_up + options.steps + 1  # the last step has no end that is seen
    torch.manual_seed(SEED)
    module = TimedGPT(options, give_turn_away)
    texts: Any = torch.randint(VOCABULARY, (num_steps * options.batch_size, options.tokens + 1))
    strategy = "auto" if contender.options is None else SuperpipeStrategy(**contender.options)
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
    if isinstance(strategy, SuperpipeStrategy):
        report = strategy.report()
        contender.loads, contender.num_units = report.last_step.num_loads, report.num_units
        contender.unit_overhead_us = report.unit_overhead_us


def show(contenders: list[Contender], loads: list[float]) -> None:
    """Print a table; the ratios are of steps of one round."""
    plain = contenders[0]
    table = Table(
        "", "step, ms", "over plain", "quartiles", "processor time", "added to a use of a unit", "engine alone"
    )
    for contender in contenders:
        ratios, cpu = contender.ratios(plain), contender.ratios(plain, "cpu_ms")
        low, middle, high = statistics.quantiles(ratios, n=4)
        added = (middle - 1) * statistics.median(plain.wall_ms) * 1e3 / max(2 * contender.num_units, 1)
        own = contender.unit_overhead_us
        table.add_row(
            contender.name,
            f"{statistics.median(contender.wall_ms):.1f}",
            f"{middle - 1:+.1%}",
            f"{low - 1:+.1%} to {high - 1:+.1%}",
            f"{statistics.median(cpu) - 1:+.1%}",
            "" if own is None else f"{added:.0f} us",
            "" if own is None else f"{own:.0f} us",
        )
    Console(width=120).print(table)
    same = len({contender.last_loss for contender in contenders}) == 1
    print(
        f"last losses are {'equal' if same else 'NOT EQUAL'}; load average {loads[0]:.1f} before, {loads[1]:.1f} after"
    )


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
