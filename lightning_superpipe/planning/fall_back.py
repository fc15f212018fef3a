"""The next smaller setting, for a device that had less room than was planned for, and what to say of that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from humanize import naturalsize

from lightning_superpipe.planning.budget import MemoryNeed
from lightning_superpipe.planning.search import MOST_PARTS
from lightning_superpipe.planning.workload import Setting

__all__ = ["knobs", "shortage", "smaller"]


def smaller(
    setting: Setting,
    *,
    opens_k: bool,
    opens_resident: bool,
    may_recompute: Collection[int],
    may_split: Collection[int] = (),
    num_units: int,
) -> Setting | None:
    """Return a setting that takes less; None if none is left open.

    Units that stay are given up first, half of them at a time, then slots down to 2, which still overlap; then units
    that may recompute do so, and split their batch into twice as many parts if they may; a single slot is the last
    resort.

    Args:
        opens_k, opens_resident: whether these may change.
        may_recompute: units that may.
        may_split: units whose batch may be split when they recompute.

    >>> plan: Setting | None = Setting(4, resident=3)
    >>> while plan:
    ...     plan = smaller(plan, opens_k=True, opens_resident=True, may_recompute=[1], num_units=2)
    ...     if plan:
    ...         print(plan.k, plan.resident, *plan.activations)
    4 1
    4 0
    2 0
    2 0 keep recompute
    1 0 keep recompute
    >>> split = smaller(Setting(2, activations=("recompute",)), opens_k=True, opens_resident=True, may_recompute=[0],
    ...                 may_split=[0], num_units=1)
    >>> split.k, split.micro_batches
    (2, 2)
    """
    if opens_resident and setting.resident:
        return replace(setting, resident=setting.resident // 2)
    if opens_k and setting.k > 2:
        return replace(setting, k=2, k_prime=1)
    policies = [setting.policy(index) for index in range(num_units)]
    fewer = ["recompute" if index in may_recompute else policy for index, policy in enumerate(policies)]
    if fewer != policies:
        return replace(setting, activations=tuple(fewer))
    is_split = any(fewer[index] == "recompute" for index in may_split)
    if is_split and setting.micro_batches < MOST_PARTS:
        return replace(setting, micro_batches=2 * setting.micro_batches)
    return replace(setting, k=1, k_prime=1) if opens_k and setting.k > 1 else None


def shortage(
    setting: Setting, need: MemoryNeed, limit_bytes: int | None, reason: str, where: str, *, trains: bool
) -> str:
    """Say that there was no room, with the numbers.

    Args:
        setting: that was in force.
        need: what is known without activations.
        limit_bytes: that the plan had to keep; None for none.
        reason: what the device said.
        where: what ran last, in words.
        trains: it was a training step.
    """
    slots = min(setting.k + setting.resident, need.num_units) * need.slot_bytes
    limit = "" if limit_bytes is None else f" of {_size(limit_bytes)} that may be used"
    ran = f"It ran {where}; " if where else ""
    return (
        f"the device has no room for a {'training step' if trains else 'pass'} with {knobs(setting)}: "
        f"{reason.rstrip('. ')}. {ran}slots take {_size(slots)} and anchors {_size(need.anchor_bytes)}{limit}."
    )


def knobs(setting: Setting) -> str:
    """Name what a setting decides about memory.

    >>> knobs(Setting(k=2, resident=1, activations=("keep", "recompute")))
    'k=2, 1 resident, activations keep and recompute'
    """
    policies = set(setting.activations) or {"keep"}
    parts = f" in {setting.micro_batches} micro-batches" if setting.micro_batches > 1 else ""
    return f"k={setting.k}, {setting.resident} resident, activations {' and '.join(sorted(policies))}{parts}"


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
