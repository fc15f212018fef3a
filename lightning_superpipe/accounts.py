"""What a session's report is made of: counters of its engine, and bytes on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.host_memory import training_bytes
from lightning_superpipe.observe.host_bytes import HostBytes
from lightning_superpipe.observe.report import PeakBytes, Report, StepCounters
from lightning_superpipe.observe.trace import Recording
from lightning_superpipe.optimizer import UpdateStage
from lightning_superpipe.planning.budget import KeptBytes, MemoryNeed
from lightning_superpipe.planning.workload import Setting
from lightning_superpipe.tiers import DiskTraffic

__all__ = ["counters_of", "finish_recording", "kept_bytes", "make_report", "static_bytes"]


def counters_of(engine: Engine, traffic: DiskTraffic) -> StepCounters:
    """Return what an engine has done so far."""
    residency, lanes = engine.residency, engine.lanes
    return StepCounters(
        num_loads=residency.num_loads,
        num_plan_misses=residency.num_plan_misses,
        h2d_bytes=lanes.h2d_bytes,
        d2h_bytes=lanes.d2h_bytes,
        stall_seconds=lanes.stall_seconds,
        disk_read_bytes=traffic.read,
        disk_written_bytes=traffic.written,
    )


def static_bytes(engine: Engine, updates: UpdateStage | None, need: MemoryNeed) -> tuple[int, int]:
    """Return the device bytes of slots, and of anchors and what updates on the device keep there."""
    anchors = engine.anchors.num_bytes if engine.anchors.have_copies else need.anchor_bytes
    scratch = 0 if updates is None or updates.device is None else updates.device.held_bytes
    return engine.slots.num_bytes, anchors + scratch


def finish_recording(engine: Engine, setting: Setting, resident_bytes: int, budget_bytes: int | None) -> Recording:
    """End the recording of a step, and return it.

    Args:
        resident_bytes: what the ordinary run would hold on the device at least.
        budget_bytes: what the plan may use there; None for no limit.
    """
    return engine.lanes.stop_recording().finish(
        unit_names=[unit.name for unit in engine.units],
        k=setting.k,
        k_prime=setting.k_prime,
        device=str(engine.device),
        emulated=not is_separate(engine.device),
        resident_bytes=resident_bytes,
        budget_bytes=budget_bytes,
    )


def kept_bytes(engine: Engine, updates: UpdateStage | None, need: MemoryNeed) -> KeptBytes:
    """Return the device bytes of anchors, and those that updates on the device take, whether there were some or not."""
    anchors = static_bytes(engine, None, need)[1]
    if updates is None or updates.device is None:
        return KeptBytes(anchors)
    return KeptBytes(anchors, updates.device.kept_bytes, updates.device.kernel_bytes)


def make_report(
    engine: Engine,
    updates: UpdateStage | None,
    traffic: DiskTraffic,
    *,
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    setting: Setting,
    need: MemoryNeed,
    peak: PeakBytes,
    host: HostBytes,
    num_steps: int,
    last_step: StepCounters,
    sees_loop: bool,
    plan: str,
    endurance_tb: float | None,
) -> Report:
    """Return what streaming cost and saved so far.

    Args:
        need: device bytes that were known before the first step; they stand in for a peak that nobody has seen.
        num_steps: training steps so far.
    """
    num_slots = setting.k + setting.resident
    if not peak.total:
        slots = num_slots * need.slot_bytes
        peak = peak._replace(slots=slots, anchors=need.total(num_slots) - need.gradient_bytes - slots)
    return Report(
        k=setting.k,
        k_prime=setting.k_prime,
        num_resident=setting.resident,
        micro_batches=setting.micro_batches,
        num_on_device=0 if updates is None or updates.device is None else updates.device.num_units,
        num_units=len(engine.units),
        num_steps=num_steps,
        peak=peak,
        resident_bytes=sum(training_bytes(root, optimizers, has_gradients=num_steps > 0)),
        num_parameters=sum(p.numel() for p in root.parameters() if not nn.parameter.is_lazy(p)),
        host=host,
        last_step=last_step,
        total=counters_of(engine, traffic),
        device=str(engine.device),
        emulated=not is_separate(engine.device),
        sees_loop=sees_loop,
        unit_overhead_us=engine.overhead_us(),
        plan=plan,
        endurance_tb=endurance_tb,
    )
