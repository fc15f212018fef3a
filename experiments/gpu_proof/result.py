"""What a stage found, with everything that figures need to be believed, as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.gpu_proof.job import Job, Outcome, Status
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.trace import software_versions
from lightning_superpipe.sweeps.files import replacing

__all__ = ["Grid", "StageResult", "all_versions", "known_outcomes", "load_results"]

_FORMAT = "lightning_superpipe.gpu_proof"
_FORMAT_VERSION = 1
_PACKAGES = (
    "transformers",
    "accelerate",
    "torchao",
    "deepspeed",
    "trainstream",
    "diffusers",
    "triton",
    "nvidia-nccl-cu13",
)


@dataclass(frozen=True)
class Grid:
    """A table, for the terminal and for pages.

    Attributes:
        note: what must be known to read it; one paragraph.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def without(self, columns: Collection[str], why: str) -> Grid:
        """Return the table without some columns, and its note with the reason; the table itself if it has none of them.

        >>> Grid("Windows", ["k", "step ms"], [["2", "83.1"]], "Tiny.").without({"step ms"}, "No times.")
        Grid(title='Windows', columns=['k'], rows=[['2']], note='Tiny. No times.')
        """
        kept = [index for index, column in enumerate(self.columns) if column not in columns]
        if len(kept) == len(self.columns):
            return self
        rows = [[row[index] for index in kept] for row in self.rows]
        return Grid(self.title, [self.columns[index] for index in kept], rows, f"{self.note} {why}".strip())


@dataclass(frozen=True)
class StageResult:
    """One stage's result.

    Attributes:
        stage: its name.
        size: name in ``SIZES``.
        label: what stands above every table of it, such as ``"NVIDIA H200"`` or ``"CPU, tiny size, emulation"``.
        emulated: nothing of it was measured on a GPU; such figures never stand beside measured ones.
        command: that was typed.
        seed: of weights, tokens and tests.
        date: ISO 8601.
        machine: system, cores, memory, accelerator, driver, CUDA, by name.
        versions: of the software, by name.
        seconds: that the stage took.
        problem: why it is not whole; empty if it is.
        outcomes: of its processes, in order, with raw samples.
        facts: what is not a process's outcome.
    """

    stage: str
    size: str
    label: str
    emulated: bool
    command: str
    seed: int
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    seconds: float
    problem: str = ""
    outcomes: tuple[Outcome, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write ``<stage>.json``; a result from before is replaced as a whole."""
        state = {**self.__dict__, "outcomes": [outcome.to_dict() for outcome in self.outcomes]}
        path = folder / f"{self.stage}.json"
        with replacing(path) as draft:
            draft.write_text(json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION, **state}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> StageResult:
        """Read what ``save`` wrote.

        Raises:
            SuperpipeError: the file holds something else.
        """
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if (state.pop("format"), state.pop("version")) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError("its format or version is another")
            outcomes = tuple(Outcome.from_dict(outcome) for outcome in state.pop("outcomes"))
            return cls(outcomes=outcomes, **state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SuperpipeError(
                f"{str(path)!r} is no result of a stage ({error!r}). Give the folder that prove.py wrote."
            ) from error


def load_results(folder: Path, stages: Sequence[str]) -> list[StageResult]:
    """Read the results of a folder in the order of the stages; those that did not run are left out.

    Raises:
        SuperpipeError: there is none, or a file holds something else, or two machines or sizes are mixed.
    """
    found = [StageResult.load(path) for stage in stages if (path := folder / f"{stage}.json").exists()]
    if not found:
        raise SuperpipeError(f"{str(folder)!r} holds no result: run prove.py --out {folder} first.")
    if len(labels := {result.label for result in found}) > 1:
        raise SuperpipeError(
            f"{str(folder)!r} mixes results of {', '.join(sorted(labels))}: give each machine and size its own folder."
        )
    return found


def known_outcomes(path: Path, label: str) -> dict[Job, Outcome]:
    """Return what an earlier command found and need not be run again: runs that finished or that did not fit.

    Raises:
        SuperpipeError: the file is another machine's, or other versions ran.
    """
    if not path.exists():
        return {}
    earlier = StageResult.load(path)
    if (earlier.label, earlier.versions) != (label, all_versions()):
        raise SuperpipeError(
            f"{str(path)!r} comes from {earlier.label!r} or from other versions than those that would run now: leave "
            "--resume out, or give another --out."
        )
    return {one.job: one for one in earlier.outcomes if one.status in (Status.OK, Status.NO_MEMORY)}


def all_versions() -> dict[str, str]:
    """Return the versions of everything that takes part, as far as it is installed."""
    versions = software_versions()
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("PYTORCH_", "OMP_"))}
    return {**versions, **settings}
