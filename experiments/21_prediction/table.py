"""Writes the tables of this folder's README from the committed results, between the marks that name them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import errors
from results_file import newest
from sweep import NUM_LARGE, best_of, words

README = Path(__file__).resolve().parent / "README.md"
TIME, BYTES, CHOICE = 0.1, 0.03, 0.05  # what is aimed at


def predictions(*, told: bool) -> str:
    """A row for each model whose compute takes a told time, or for each other."""
    states = [state for state in newest("grid") if state["told"] is told]
    lines = [
        _row("model", "settings", "time off: median, worst", "within 10 %", "bytes off: median, worst", "within 3 %"),
        _row(*["---"] * 6),
    ]
    for state in states:
        time_off, bytes_off = (list(each) for each in zip(*map(errors, state["rows"]), strict=True))
        lines.append(
            _row(
                f"{state['name']} ({state['link']['h2d_gb_s']:g} GB/s)",
                len(time_off),
                _off(time_off),
                _within(time_off, TIME),
                _off(bytes_off),
                _within(bytes_off, BYTES),
            )
        )
    off = [errors(row) for state in states for row in state["rows"]]
    time_off, bytes_off = (list(each) for each in zip(*off, strict=True))
    lines.append(
        _row("**all**", len(off), _off(time_off), _within(time_off, TIME), _off(bytes_off), _within(bytes_off, BYTES))
    )
    return "\n".join(lines)


def choices() -> str:
    """A row for each model and budget, and how long planning took."""
    lines = [
        _row("model", "budget", "chosen", "best of the sweep", "allowed", "chosen / best"),
        _row(*["---"] * 6),
    ]
    states = [state for state in newest("sweep") if state["pairs"]]
    for state in states:
        for pair in state["pairs"]:
            best = best_of(pair)
            lines.append(
                _row(
                    f"{state['name']} ({state['link']['h2d_gb_s']:g} GB/s)",
                    f"{pair['budget_bytes'] / 1e6:.0f} MB",
                    f"{words(pair['setting'])}: {pair['measured_ms']:.0f} ms",
                    f"{words(best['setting'])}: {best['ms']:.0f} ms",
                    pair["num_allowed"],
                    f"{pair['measured_ms'] / best['ms']:.3f}",
                )
            )
    seconds = max(max(state["planning_s"]) for state in states)
    ratios = [pair["measured_ms"] / best_of(pair)["ms"] for state in states for pair in state["pairs"]]
    return "\n".join(lines) + (
        f"\n\nWithin {CHOICE:.0%} of the best: {sum(ratio <= 1 + CHOICE for ratio in ratios)} of {len(ratios)}. "
        f"Planning {NUM_LARGE} units took at most {seconds:.2f} s."
    )


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _off(values: Sequence[float]) -> str:
    return f"{statistics.median(map(abs, values)):.1%}, {max(values, key=abs):+.1%}"


def _within(values: Sequence[float], bound: float) -> int:
    return sum(abs(value) <= bound for value in values)


def write(parts: dict[str, Any]) -> None:
    """Put each part between its marks."""
    text = README.read_text(encoding="utf-8")
    for name, part in parts.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(f"{README}: {count} places are marked <!-- {name} --> ... <!-- end -->; one is needed.")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write({"told": predictions(told=True), "real": predictions(told=False), "choices": choices()})
