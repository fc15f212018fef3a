"""A played step on a machine: seconds from its measured rates, bytes as they are."""

from __future__ import annotations

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.forecast.played import PlayedStep, PlayedUnit
from lightning_superpipe.forecast.tape import Part
from lightning_superpipe.observe import MachineProfile
from lightning_superpipe.planning.workload import UnitWork, Workload

__all__ = ["part_seconds", "workload_on"]


def workload_on(profile: MachineProfile, step: PlayedStep, host: MachineProfile | None = None) -> Workload:
    """Return the workload of a step on a machine, without what the loop takes for itself and for data.

    Args:
        profile: of the device.
        step: what runs.
        host: whose updates count; None takes those of ``profile``.

    Raises:
        SuperpipeError: the profile has no compute rates, or neither has updates.
    """
    host = host if host is not None and not profile.updates else profile
    total = sum(unit.num_trained for unit in step.units)
    state_bytes = step.host.states + step.host.masters
    per_parameter = state_bytes / max(total + step.num_trained_outside, 1)
    spread = state_bytes / max(total, 1)  # states outside units count with those inside: they have no other place
    units = (_unit_work(profile, host, unit, per_parameter, spread) for unit in step.units)
    first = next((index for index, unit in enumerate(step.units) if unit.tape.backward.operations), len(step.units))
    return Workload(
        units=tuple(units),
        anchor_bytes=step.kept.anchors,
        turn_s=part_seconds(profile, step.turn),
        turn_bytes=max(0, step.turn.peak_bytes - _held(step)),
        between_s=_update_seconds(host, "float32", step.num_trained_outside, per_parameter),
        lowest=first,
        samples=step.samples,
        tokens=step.tokens,
        undisturbed=step.undisturbed,
        shares_memory=profile.emulated,
        update_bytes=step.kept.updates,
        kernel_bytes=step.kept.kernels,
    )


def part_seconds(profile: MachineProfile, part: Part) -> float:
    """Return how long a part computes: each operation as long as its products, its bytes or its start take.

    Raises:
        SuperpipeError: the profile has no rates of compute or of the device's memory.
    """
    seconds = 0.0
    for (dtype, num_flops, num_bytes, work), count in part.operations.items():
        compute, memory = profile.compute_curve(dtype), profile.memory_curve(work)
        if compute is None or memory is None:
            raise SuperpipeError(
                f"the profile of {profile.device!r} has no rates of compute: measure the machine again (superpipe "
                "profile --again)."
            )
        product_s = compute.seconds(num_flops) if num_flops else 0.0
        seconds += count * max(profile.launch_s, memory.seconds(num_bytes), product_s)
    return seconds


def _held(step: PlayedStep) -> int:
    """Bytes that the units' forwards leave, all together."""
    return sum(_activations(unit) for unit in step.units)


def _activations(unit: PlayedUnit) -> int:
    return max(0, unit.tape.end_bytes - unit.tape.begin_bytes)


def _unit_work(
    profile: MachineProfile, host: MachineProfile, unit: PlayedUnit, state_bytes: float, spread_bytes: float
) -> UnitWork:
    tape, held = unit.tape, _activations(unit)
    backward_s = part_seconds(profile, tape.backward)
    return UnitWork(
        name=tape.name,
        weight_bytes=unit.weight_bytes,
        gradient_bytes=unit.gradient_bytes,
        state_bytes=round(spread_bytes * unit.num_trained),
        forward_s=part_seconds(profile, tape.forward),
        backward_s=backward_s,
        update_s=_update_seconds(host, unit.update_dtype, unit.num_trained, state_bytes),
        activation_bytes=held,
        input_bytes=min(held, max(0, held - tape.inner_bytes)),
        offload_bytes=min(held, tape.saved_bytes),
        forward_bytes=max(0, tape.forward.peak_bytes - tape.begin_bytes),
        backward_bytes=max(0, tape.backward.peak_bytes - tape.end_bytes),
        unfreed_backward_bytes=max(0, tape.backward.unfreed_bytes - tape.end_bytes),
        policies=unit.policies,
        splits=unit.splits,
    )


def _update_seconds(host: MachineProfile, dtype: str, num_trained: int, state_bytes: float) -> float:
    size = 2 if dtype in ("bfloat16", "float16") else 4
    found = host.update_seconds(dtype, num_trained, num_states=round(state_bytes / size))
    if found is None:
        raise SuperpipeError(
            "no machine profile says how fast the host updates weights: measure this machine (superpipe profile)."
        )
    return found
