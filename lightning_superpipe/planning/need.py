"""The memory that a setting needs, counted without playing it: what activations that travel do not hold up."""

from __future__ import annotations

from dataclasses import replace

from lightning_superpipe.planning.prediction import HostUse, PeakBytes
from lightning_superpipe.planning.workload import Setting, UnitWork, Workload, updated_there

__all__ = [
    "ACTIVATION_BUFFERS",
    "GRADIENT_UNITS",
    "backward_peak_bytes",
    "device_need",
    "forward_peak_bytes",
    "gradient_limit_bytes",
    "host_use",
    "num_slots",
    "of_whole_batch",
    "recompute_peak_bytes",
    "saved_bytes",
    "unfreed_backward_peak_bytes",
]

GRADIENT_UNITS = 2
"""So many times the largest unit's gradients may be on the device: those of the unit that computes, and one before."""

ACTIVATION_BUFFERS = 3
"""Between device and files: one is copied from or to, one is written or read, one is next."""

_NUM_SENT = 2  # batches of offloaded activations that may be on their way home


def num_slots(workload: Workload, setting: Setting) -> int:
    """Return how many slots there are: never more than units.

    >>> num_slots(Workload((UnitWork("h", 10),) * 4), Setting(k=3, resident=5))
    4
    """
    return min(setting.k + setting.resident, len(workload.units))


def gradient_limit_bytes(workload: Workload) -> int:
    """Return the room for gradients on the device; a backward that needs more waits."""
    return GRADIENT_UNITS * max((unit.gradient_bytes for unit in workload.units), default=0) if workload.trains else 0


def saved_bytes(workload: Workload, setting: Setting, index: int) -> int:
    """Return what a unit's forward leaves for its backward, on the device or offloaded."""
    if not workload.trains or index < workload.lowest:
        return 0
    unit = workload.units[index]
    return unit.input_bytes if setting.policy(index) == "recompute" else unit.activation_bytes


def forward_peak_bytes(unit: UnitWork, policy: str, micro_batches: int) -> int:
    """Return the most that a forward takes beside what is held.

    Of a batch in parts, that is the last one beside the outputs of all others, or all outputs while they are joined;
    outputs are taken to be as large as inputs.
    """
    parts = micro_batches if policy == "recompute" and unit.splits else 1
    if parts == 1:
        return unit.forward_bytes
    last = (unit.forward_bytes - unit.input_bytes) // parts + (parts - 1) * unit.input_bytes // parts
    return unit.input_bytes + max(last, 2 * unit.input_bytes)


def backward_peak_bytes(unit: UnitWork, policy: str, micro_batches: int) -> int:
    """Return the most that a backward takes beside what is held, its own gradients included.

    Of a batch in parts the gradients of the whole output are there, and by the last part those of the other inputs.
    """
    if policy != "recompute":
        return unit.backward_bytes
    parts = micro_batches if unit.splits else 1
    took = unit.activation_bytes - unit.input_bytes + unit.backward_bytes
    if parts == 1:
        return took
    return took // parts + unit.gradient_bytes + 2 * (parts - 1) * unit.input_bytes // parts


def recompute_peak_bytes(unit: UnitWork, micro_batches: int) -> int:
    """Return the most that a forward takes beside what is held when it is computed again.

    Its inputs are held, but gradients of its outputs are there; they are taken to be as large. What comes behind the
    last tensor that is saved is not computed again, so where a forward's peak is at its end this is too much by that.
    """
    return (unit.forward_bytes - unit.input_bytes) // (micro_batches if unit.splits else 1) + unit.input_bytes


def of_whole_batch(unit: UnitWork, micro_batches: int) -> UnitWork:
    """Return what a unit takes for its whole batch, from what it was measured to take for one in parts.

    The inverse of :func:`forward_peak_bytes` and :func:`backward_peak_bytes`, so that what was measured in so many
    parts is predicted for as many.

    Args:
        unit: it recomputes; its forward and backward bytes are all that those of a batch in parts take beside what is
            held.

    >>> whole = UnitWork("h", 10, 8, activation_bytes=40, input_bytes=4, forward_bytes=48, backward_bytes=12)
    >>> forward, backward = (peak(whole, "recompute", 4) for peak in (forward_peak_bytes, backward_peak_bytes))
    >>> parts = replace(whole, forward_bytes=forward, backward_bytes=backward)
    >>> of_whole_batch(parts, 4) == replace(whole, unfreed_backward_bytes=12)
    True
    """
    others = 2 * (micro_batches - 1) * unit.input_bytes // micro_batches
    saved = unit.activation_bytes - unit.input_bytes
    backward = max(0, micro_batches * max(0, unit.backward_bytes - unit.gradient_bytes - others) - saved)
    return replace(
        unit,
        forward_bytes=unit.input_bytes + micro_batches * max(0, unit.forward_bytes - unit.input_bytes - others // 2),
        backward_bytes=backward,
        unfreed_backward_bytes=backward,
    )


def unfreed_backward_peak_bytes(unit: UnitWork, share: float) -> int:
    """Return the most that a backward takes while nothing of what its forward saved is let go.

    Args:
        share: of the backward, for which that is so; what it takes is thought to grow evenly.

    >>> unfreed_backward_peak_bytes(UnitWork("h", 10, backward_bytes=4, unfreed_backward_bytes=12), 0.75)
    9
    """
    return max(unit.backward_bytes, round(share * unit.unfreed_backward_bytes))


def device_need(workload: Workload, setting: Setting) -> PeakBytes:
    """Return device bytes by kind at the worst moment, gradients as far behind as they may be.

    Offloaded activations are counted as where the link keeps up with them; behind a slower one a step may hold more,
    which the simulation tells.

    >>> unit = UnitWork("h", 10, 10, activation_bytes=5, input_bytes=1, offload_bytes=4, forward_bytes=6)
    >>> device_need(Workload((unit,) * 4, anchor_bytes=3), Setting(k=2))
    PeakBytes(slots=20, anchors=3, gradients=20, activations=10)
    >>> device_need(Workload((unit,) * 4), Setting(k=2, activations=("recompute",) * 4)).activations
    8
    """
    units, micro_batches, limit = workload.units, setting.micro_batches, gradient_limit_bytes(workload)
    held, worst, above = 0, (0, 0), sum(unit.gradient_bytes for unit in units[workload.lowest :])
    offloaded: list[int] = []  # of units so far
    for index, unit in enumerate(units):
        policy = setting.policy(index)
        took = held + sum(offloaded[-_NUM_SENT:]) + forward_peak_bytes(unit, policy, micro_batches)
        worst = max(worst, (took, 0), key=sum)
        saved = saved_bytes(workload, setting, index)
        if saved and policy == "offload":
            offloaded.append(unit.offload_bytes)
            saved -= unit.offload_bytes
        held += saved
        if not workload.trains or index < workload.lowest:
            continue
        above -= unit.gradient_bytes
        num_near = _NUM_SENT + (index == len(units) - 1 and policy == "offload")  # the last never travel
        near = held + sum(offloaded[-num_near:])
        backward = backward_peak_bytes(unit, policy, micro_batches)
        own = min(backward, unit.gradient_bytes)
        worst = max(worst, (near + backward - own, min(limit, own + above)), key=sum)
        if policy == "recompute":
            worst = max(worst, (near + recompute_peak_bytes(unit, micro_batches), min(limit, above)), key=sum)
    if workload.trains:
        num_near = _NUM_SENT + (setting.policy(len(units) - 1) == "offload")
        worst = max(worst, (held + sum(offloaded[-num_near:]) + workload.turn_bytes, 0), key=sum)
    slots = num_slots(workload, setting) * workload.slot_bytes
    updates = workload.update_bytes + workload.kernel_bytes if updated_there(workload, setting) else 0
    return PeakBytes(slots, workload.anchor_bytes + updates, worst[1], worst[0])


def host_use(workload: Workload, setting: Setting) -> HostUse:
    """Return what a step holds in host memory.

    >>> from lightning_superpipe.planning.workload import UnitWork
    >>> host_use(Workload((UnitWork("h", 10, 10, state_bytes=20),) * 4, anchor_bytes=5), Setting(k=2)).total
    165
    """
    units = workload.units
    offloads = [
        unit.offload_bytes
        for index, unit in enumerate(units[:-1])
        if workload.trains and index >= workload.lowest and setting.policy(index) == "offload"
    ]
    has_gradients = workload.trains and "gradients" not in workload.in_files
    in_files = "activations" in workload.in_files
    return HostUse(
        weights=workload.anchor_bytes + sum(unit.weight_bytes for unit in units if not unit.disk_read_bytes),
        gradients=sum(unit.gradient_bytes for unit in units) if has_gradients else 0,
        states=sum(unit.state_bytes for unit in units) if workload.trains else 0,
        activations=ACTIVATION_BUFFERS * max(offloads, default=0) if in_files else sum(offloads),
        staging=workload.staging_bytes,
    )
