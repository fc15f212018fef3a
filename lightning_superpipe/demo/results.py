"""What a demo run leaves: pictures, a trace, a report as JSON, text - and the closing words, which claim no more."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from humanize import naturalsize

from lightning_superpipe.observe import Recording, Report, write_recording

__all__ = ["Results", "conclusion", "write_results"]

_NUM_AVERAGED = 10  # losses of single batches are noisy


@dataclass(frozen=True)
class Results:
    """What one run found.

    Attributes:
        report: of training.
        recording: of one training step.
        losses: nats per byte, one per step.
        held_out_bits_per_byte: at the end of training.
        seconds: that training took, validation included.
        samples: texts that the trained network wrote.
        command: what was run.
    """

    report: Report
    recording: Recording
    losses: list[float]
    held_out_bits_per_byte: float
    seconds: float
    samples: list[str]
    command: list[str]

    @property
    def last_loss(self) -> float:
        """Mean loss of the last steps, nats per byte."""
        last = self.losses[-_NUM_AVERAGED:]
        return sum(last) / len(last)

    @property
    def peak_bytes(self) -> int:
        """Most device bytes seen: in the steps that were measured closely, the recorded one among them."""
        recorded = self.recording.peak
        return max(self.report.peak_device_bytes, recorded.total if recorded else 0)

    @property
    def is_within_budget(self) -> bool:
        """Whether the device never held more than it was allowed."""
        budget = self.recording.budget_bytes
        return budget is not None and self.peak_bytes <= budget

    def as_json(self) -> dict[str, Any]:
        """Return the numbers, with everything needed to make them again."""
        return {
            "emulated": self.report.emulated,
            "command": " ".join(self.command),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": self.recording.versions,
            "seconds": round(self.seconds, 1),
            "budget_bytes": self.recording.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "is_within_budget": self.is_within_budget,
            "held_out_bits_per_byte": self.held_out_bits_per_byte,
            "report": self.report.as_metrics(prefix=""),
            "losses": self.losses,
        }


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write everything into a folder; return the files, those to look at first.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {
        "sample.txt": "\n\n".join(results.samples) + "\n",
        "report.json": json.dumps(results.as_json(), indent=1) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*write_recording(results.recording, folder), *(folder / name for name in texts)]


def conclusion(results: Results, frequency_bits: float, paths: list[Path]) -> str:
    """Return the closing words.

    Args:
        frequency_bits: what knowing only how often each byte occurs would give, bits per held-out byte.
        paths: files that were written.
    """
    learned = (
        f"loss {results.losses[0]:.2f} -> {results.last_loss:.2f} nats per byte in {len(results.losses)} steps "
        f"({results.seconds:.0f} s); held-out text {results.held_out_bits_per_byte:.2f} bits per byte "
        f"(byte frequencies alone: {frequency_bits:.2f}, nothing at all: 8.00)"
    )
    written = "\n".join(f"  | {line}" for line in results.samples[0].splitlines())
    places = ", ".join(path.name for path in paths)
    return (
        f"\n{learned}\n\n{results.report}\n\n{_verdict(results)}\n\n"
        f"It now writes (the first of {len(results.samples)} samples):\n{written}\n\n"
        f"In {paths[0].parent}/: {places}\ntrace.json opens in https://ui.perfetto.dev"
    )


def _verdict(results: Results) -> str:
    """Say whether the device's memory sufficed, as measured."""
    peak, budget = results.peak_bytes, results.recording.budget_bytes or 0
    held, allowed = naturalsize(peak, binary=True), naturalsize(budget, binary=True)
    if results.is_within_budget:
        return f"Budget kept: the device held {held} at most in the steps measured, {allowed} were allowed."
    return (
        f"BUDGET EXCEEDED: the device held {held}, {allowed} were allowed. Activations are not planned for: "
        "use a smaller --batch-size, or allow more."
    )
