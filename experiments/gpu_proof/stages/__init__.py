"""The stages, one file each: ``run(bench) -> Findings`` measures, ``grids(result)`` makes tables of what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.gpu_proof.job import Job, Outcome
from experiments.gpu_proof.peers import devices_of
from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.sizes import SIZES, Size
from experiments.gpu_proof.watch import Deadline, Watcher

__all__ = ["STAGES", "Bench", "Findings", "grids", "run_stage"]

STAGES = ("tests", "machine", "trace", "sweep", "peers", "headroom")
"""In order of worth: what holds, what the machine can do, what a step looks like, and then the comparisons."""


_SPEED = frozenset(
    ("step ms", "tokens/s", "of resident", "busy ms", "of the step", "GB/s while busy", "of the measured link")
)


@dataclass(frozen=True)
class Findings:
    """What a stage hands over.

    Attributes:
        problem: why it is not whole; empty if it is.
    """

    outcomes: tuple[Outcome, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Bench:
    """What every stage works with.

    Attributes:
        size_name: name in ``SIZES``.
        device: ``cuda``, ``cpu`` or ``emu``.
        out: folder of the results.
        deadline: of the stage.
        say: prints a line.
        batch_size: instead of the size's.
        known: outcomes of an earlier command that hold.
    """

    size_name: str
    device: str
    seed: int
    out: Path
    watcher: Watcher
    deadline: Deadline
    say: Callable[[str], None]
    batch_size: int | None = None
    known: Mapping[Job, Outcome] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """The scale of things."""
        return SIZES[self.size_name]

    def job(self, task: str, **options: Any) -> Job:
        """Return a job of this bench's size, device and seed."""
        shared = {"size": self.size_name, "device": self.device, "seed": self.seed, "batch_size": self.batch_size}
        return Job(task, **{**shared, **options})

    def run(self, job: Job) -> Outcome:
        """Run a job in its own process and say how it ended; what is known from before is not run again."""
        if job in self.known:
            return self.known[job]
        outcome = self.watcher.run(job, self.deadline)
        rate = outcome.tokens_per_s
        told = f"{rate:,.0f} tokens/s" if rate else outcome.reason
        self.say(f"  {job.name}: {outcome.status.value} ({outcome.seconds:.1f} s) {told}")
        return outcome

    def contender(self, task: str, peer: str, **options: Any) -> Job:
        """Return a contender's job; where the emulated device is nothing for it, on the CPU, which counts no bytes."""
        if self.device == "emu" and "emu" not in devices_of(peer):
            options["device"] = "cpu"
        return self.job(task, peer=peer, **options)


def run_stage(name: str, bench: Bench) -> Findings:
    """Run a stage; whatever it raises becomes its problem, so that the next one runs."""
    try:
        findings: Findings = import_module(f"{__name__}.{name}").run(bench)
        return findings
    except Exception as error:
        return Findings(problem=f"{type(error).__name__}: {error}")


def grids(result: StageResult) -> list[Grid]:
    """Return the tables of a stage's result; those of an emulation show no speed, which its JSON holds all the same."""
    made: list[Grid] = import_module(f"{__name__}.{result.stage}").grids(result)
    return (
        [grid.without(_SPEED, "Speed is left out: an emulation has none.") for grid in made]
        if result.emulated
        else made
    )
