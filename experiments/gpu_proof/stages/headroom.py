"""Stage 6: the largest model that fine-tunes within a cap of device memory, by bisection over the number of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import psutil
from humanize import metric

from experiments.gpu_proof.job import Job, Outcome, Status
from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.sizes import Size
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, size, throughput

__all__ = ["Bracket", "bisect", "grids", "run"]

PEERS = ("resident", "superpipe")
_PRECISION = 1 / 8  # of the number of blocks
_HOST_BYTES_PER_PARAMETER = 10  # weights, gradients, two states in bfloat16, and weights once more while it is set up
_HOST_SHARE = 0.85


class Bracket(NamedTuple):
    """What a search found: ``fits`` is the largest that is known to, ``fails`` the smallest that is known not to."""

    fits: int | None
    fails: int | None


def bisect(trial: Callable[[int], bool | None], start: int, most: int, precision: float = _PRECISION) -> Bracket:
    """Find the largest number that fits, by doubling and then halving.

    Args:
        trial: whether a number fits; None ends the search.
        start: where it begins.
        most: above it nothing is tried.
        precision: the search ends when the two are as near, as a share of what fits.

    >>> bisect(lambda number: number <= 100, 4, 1000, precision=0.01)
    Bracket(fits=100, fails=101)
    >>> bisect(lambda number: number <= 100, 4, 50)
    Bracket(fits=50, fails=None)
    >>> bisect(lambda number: False, 4, 50)
    Bracket(fits=None, fails=1)
    """
    fits, fails = 0, most + 1
    number = min(start, most)
    while fails - fits > max(1, int(precision * fits)):
        answer = trial(number)
        if answer is None:
            break
        fits, fails = (number, fails) if answer else (fits, number)
        number = min(2 * fits, most) if fails == most + 1 and fits else (fits + fails) // 2
    return Bracket(fits or None, fails if fails <= most else None)


def run(bench: Bench) -> Findings:
    """Search for each cap, resident and streamed, both with activation checkpointing."""
    device = "emu" if bench.device == "cpu" else bench.device  # a CPU has no memory of its own to cap
    most, reason = _most_blocks(bench.size)
    outcomes: list[Outcome] = []
    found = []
    for cap in bench.size.caps_bytes:
        for peer in PEERS:
            k, k_prime = bench.size.peer_window
            window = {"k": k, "k_prime": k_prime} if peer == "superpipe" else {}
            window |= {"batch_size": 1, "num_steps": 2}  # room is for the model
            asked = bench.job("train", peer=peer, checkpointing=True, cap_bytes=cap, device=device, **window)
            tried = _Tries(bench, asked)
            bracket = bisect(tried.fits, min(bench.size.num_blocks, most), most)
            outcomes += tried.outcomes
            found.append({"cap_bytes": cap, "peer": peer, **bracket._asdict(), "ended": tried.ended})
    ended = [f"{one['peer']} within {size(one['cap_bytes'])}: {one['ended']}" for one in found if one["ended"]]
    facts = {"found": found, "most_blocks": most, "most_because": reason}
    return Findings(tuple(outcomes), facts, "; ".join(ended))


class _Tries:
    """Tries numbers of blocks and remembers how it went."""

    def __init__(self, bench: Bench, asked: Job) -> None:
        self._bench, self._asked = bench, asked
        self.outcomes: list[Outcome] = []
        self.ended = ""

    def fits(self, num_blocks: int) -> bool | None:
        """Whether so many blocks train; None if something else than device memory was in the way."""
        outcome = self._bench.run(replace(self._asked, num_blocks=num_blocks))
        self.outcomes.append(outcome)
        if outcome.is_ok:
            return True
        if outcome.status is Status.NO_MEMORY:
            return False
        self.ended = f"{num_blocks} blocks: {outcome.status.value}, {outcome.reason}"
        return None


def _most_blocks(scale: Size) -> tuple[int, str]:
    """Return how many blocks the host's memory holds in training, and whether that or the size is the limit."""
    room = _HOST_SHARE * psutil.virtual_memory().available / _HOST_BYTES_PER_PARAMETER
    blocks = max(1, int((room - 2 * scale.vocabulary * scale.width) / scale.block_parameters))
    if blocks < scale.most_blocks:
        return blocks, f"host memory ({_HOST_BYTES_PER_PARAMETER} bytes for each parameter)"
    return scale.most_blocks, "the size"


def grids(result: StageResult) -> list[Grid]:
    """One row for each cap and contender."""
    from experiments.gpu_proof.sizes import SIZES

    scale, rows = SIZES[result.size], []
    for found in result.facts.get("found", []):
        blocks = found["fits"]
        runs = [
            one
            for one in result.outcomes
            if (one.job.cap_bytes, one.job.peer, one.job.num_blocks) == (found["cap_bytes"], found["peer"], blocks)
        ]
        weights = blocks * scale.block_parameters + 2 * scale.vocabulary * scale.width if blocks else 0
        largest = (
            [metric(weights), str(blocks), str(found["fails"] or UNKNOWN)] if blocks else [UNKNOWN, "none", UNKNOWN]
        )
        numbers = [size(runs[-1].device_peak_bytes), throughput(runs[-1])] if runs and blocks else [UNKNOWN, UNKNOWN]
        limit = found["ended"] or ("device memory" if found["fails"] else str(result.facts["most_because"]))
        rows.append([size(found["cap_bytes"]), found["peer"], *largest, *numbers, limit])
    columns = ["cap", "", "parameters", "blocks", "too many", "device peak", "tokens/s", "limited by"]
    note = (
        "AdamW, all weights train, bfloat16, activation checkpointing. Searched to an eighth of the number of blocks."
    )
    return [Grid("Largest model within a cap", columns, rows, note)] if rows else []
