"""A small four-lane simulation of one training step, recorded as the engine would record it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from lightning_superpipe.observe import Lane, Recorder, Recording

MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """Seconds and bytes of one unit, the same for all units."""

    forward_s: float = 0.003
    backward_s: float = 0.006
    load_s: float = 0.0045
    return_s: float = 0.0045
    update_s: float = 0.004
    unit_bytes: int = 12 * MIB
    activation_bytes: int = 5 * MIB
    anchor_bytes: int = 3 * MIB


def simulate_step(
    num_units: int = 12,
    k: int = 3,
    k_prime: int = 1,
    *,
    machine: Machine | None = None,
    emulated: bool = True,
    budget_bytes: int | None = None,
    resident_bytes: int | None = None,
    origin_s: float = 100.0,
) -> Recording:
    """Return the recording of one training step in which ``k_prime`` units move after ``k_prime`` have computed."""
    machine, recorder = machine or Machine(), Recorder()
    changes: list[tuple[float, str, int]] = []  # time, kind, bytes
    free = dict.fromkeys(Lane, origin_s)
    done: dict[str, float] = {}

    def work(lane: Lane, name: str, unit: int, ready_s: float, seconds: float, num_bytes: int = 0) -> float:
        start = max(free[lane], ready_s)
        free[lane] = done[f"{name}{unit}"] = start + seconds
        recorder.span(lane, name, unit, start, start + seconds, num_bytes)
        return start + seconds

    def load(position: int, name: str, used: list[int], unit: int) -> float:
        """Load the unit needed at ``position`` of a phase, once the units before it have left their slots."""
        leaves = (position - k) // k_prime * k_prime + k_prime - 1
        ready = done[f"{name}{used[leaves]}"] if position >= k else origin_s
        return work(Lane.H2D, "P", unit, ready, machine.load_s, machine.unit_bytes)

    def compute(name: str, unit: int, arrival_s: float, seconds: float) -> float:
        if arrival_s > free[Lane.COMPUTE]:
            recorder.span(Lane.COMPUTE, "stall", unit, free[Lane.COMPUTE], arrival_s)
        return work(Lane.COMPUTE, name, unit, arrival_s, seconds)

    forward = list(range(num_units))
    for position, unit in enumerate(forward):
        arrival = load(position, "F", forward, unit)
        end = compute("F", unit, arrival, machine.forward_s)
        changes.append((end, "activations", machine.activation_bytes))
    backward = forward[::-1]
    for position, unit in enumerate(backward):
        arrival = load(position, "B", backward, unit) if position >= k else origin_s
        end = compute("B", unit, arrival, machine.backward_s)
        changes.append((end - machine.backward_s / 2, "gradients", machine.unit_bytes))
        changes.append((end, "activations", -machine.activation_bytes))
        home = work(Lane.D2H, "G", unit, end, machine.return_s, machine.unit_bytes)
        changes.append((home, "gradients", -machine.unit_bytes))
        work(Lane.HOST, "U", unit, home, machine.update_s)

    _sample(recorder, changes, origin_s, slots=k * machine.unit_bytes, anchors=machine.anchor_bytes)
    return recorder.finish(
        unit_names=[f"net.blocks.{unit}" for unit in forward],
        k=k,
        k_prime=k_prime,
        device="emu:0" if emulated else "cuda:0",
        emulated=emulated,
        resident_bytes=4 * num_units * machine.unit_bytes if resident_bytes is None else resident_bytes,
        budget_bytes=budget_bytes,
        versions={"torch": "2.13.0"},
    )


def _sample(
    recorder: Recorder, changes: list[tuple[float, str, int]], origin_s: float, *, slots: int, anchors: int
) -> None:
    """Record the memory after each change (time, kind, bytes)."""
    changes.sort()
    times = [origin_s, *(time for time, _, _ in changes)]
    by_kind = {
        kind: list(accumulate([0, *(size if kind == changed else 0 for _, changed, size in changes)]))
        for kind in ("gradients", "activations")
    }
    for time, gradients, activations in zip(times, by_kind["gradients"], by_kind["activations"], strict=True):
        recorder.sample(time, slots, anchors, gradients, activations)
