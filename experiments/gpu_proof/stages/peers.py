"""Stage 5: side by side, each contender in a process of its own."""

from __future__ import annotations

from typing import NamedTuple

from experiments.gpu_proof.job import Outcome
from experiments.gpu_proof.peers import build_seconds_of
from experiments.gpu_proof.result import Grid, StageResult
from experiments.gpu_proof.stages import Bench, Findings
from experiments.gpu_proof.words import UNKNOWN, losses, ratio, share_saved, size, throughput

__all__ = ["INFERENCE", "TRAINING", "grids", "run"]

GOAL_AGAINST_PEERS = 1.5


class Entry(NamedTuple):
    """A contender as the table names it."""

    title: str
    peer: str
    checkpointing: bool = True


TRAINING = (
    Entry("resident", "resident", checkpointing=False),
    Entry("resident, checkpointing", "resident"),
    Entry("superpipe", "superpipe", checkpointing=False),
    Entry("superpipe, checkpointing", "superpipe"),
    Entry("torchao CPUOffloadOptimizer", "torchao_optimizer"),
    Entry("FSDP2 CPUOffloadPolicy", "fsdp2"),
    Entry("DeepSpeed ZeRO-3 offload", "deepspeed_zero3"),
    Entry("TrainStream", "trainstream_paging"),
)
INFERENCE = (
    Entry("resident", "resident", checkpointing=False),
    Entry("superpipe", "superpipe", checkpointing=False),
    Entry("accelerate cpu_offload", "accelerate_offload", checkpointing=False),
    Entry("diffusers group offloading", "diffusers_groups", checkpointing=False),
)


def run(bench: Bench) -> Findings:
    """Train and infer with everybody that can."""
    k, k_prime = bench.size.peer_window
    jobs = []
    for task, entries in (("train", TRAINING), ("infer", INFERENCE)):
        for entry in entries:
            window = {"k": k, "k_prime": k_prime} if entry.peer == "superpipe" else {}
            jobs.append(bench.contender(task, entry.peer, checkpointing=entry.checkpointing, **window))
    jobs.sort(key=lambda job: build_seconds_of(job.peer))  # whoever compiles first comes last, should time run out
    outcomes = [bench.run(job) for job in jobs]
    return Findings(tuple(outcomes), problem=_problem(outcomes))


def _problem(outcomes: list[Outcome]) -> str:
    """Peers may be missing; the stage is whole if resident and superpipe have numbers."""
    ours = [one for one in outcomes if one.job.peer in ("resident", "superpipe") and not one.is_ok]
    return f"without numbers: {', '.join(one.job.name for one in ours)}" if ours else ""


def grids(result: StageResult) -> list[Grid]:
    """Training, then inference."""
    return [
        _grid(result, "train", TRAINING, "Training, side by side"),
        _grid(result, "infer", INFERENCE, "Inference, side by side"),
    ]


def _grid(result: StageResult, task: str, entries: tuple[Entry, ...], title: str) -> Grid:
    found = {(one.job.peer, one.job.checkpointing): one for one in result.outcomes if one.job.task == task}
    mine = [(entry, found[entry.peer, entry.checkpointing]) for entry in entries if entry[1:] in found]
    whole = mine[0][1].device_peak_bytes if mine else None
    rate = mine[0][1].tokens_per_s if mine else None
    rows, notes = [], []
    for entry, one in mine:
        used, host = size(one.device_used_bytes), size(one.host_peak_bytes) if one.is_ok else UNKNOWN
        memory = [size(one.device_peak_bytes), share_saved(one.device_peak_bytes, whole), used, host]
        speed = [throughput(one), ratio(one.tokens_per_s, rate)]
        rows.append([entry.title, *memory, *speed, losses(one) if one.is_ok else f"{one.status.value}: {one.reason}"])
        if note := one.report.get("note"):
            notes.append(f"{entry.title}: {note}")
        if one.is_ok and one.job.device != mine[0][1].job.device:
            notes.append(f"{entry.title}: on the {one.job.device.upper()} itself, where nobody counts device bytes")
    columns = ["", "device peak", "saved", "used on the device", "host peak", "tokens/s", "of resident", "loss"]
    if task == "infer":
        columns[-1] = "mean of logits"
    return Grid(title, columns, rows, "; ".join(notes) + _verdict(result, task))


def _verdict(result: StageResult, task: str) -> str:
    """Say whether superpipe is as much faster than the sharders as it means to be, in no more memory."""
    if task == "infer" or result.emulated:
        return "."
    rates = {
        one.job.peer: one for one in result.outcomes if one.job.task == task and one.job.checkpointing and one.is_ok
    }
    told = []
    for peer in ("fsdp2", "deepspeed_zero3"):
        ours, theirs = rates.get("superpipe"), rates.get(peer)
        if ours is None or theirs is None or not ours.tokens_per_s or not theirs.tokens_per_s:
            continue
        speed, memory = (
            ours.tokens_per_s / theirs.tokens_per_s,
            (ours.device_peak_bytes or 0) / (theirs.device_peak_bytes or 1),
        )
        met = "met" if speed >= GOAL_AGAINST_PEERS and memory <= 1 else "missed"
        told.append(
            f"{GOAL_AGAINST_PEERS} x {peer} in no more device memory: {met} ({speed:.2f} x, {memory:.2f} x the memory)"
        )
    return ". Goal: " + "; ".join(told) + "." if told else "."
