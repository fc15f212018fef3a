"""Change-over: between two steps an engine gets another window, other residents and other policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_superpipe.planning import spread

if TYPE_CHECKING:
    from lightning_superpipe.engine.engine import Engine
    from lightning_superpipe.planning.workload import Setting

__all__ = ["change_over"]


def change_over(engine: Engine, setting: Setting, order: Sequence[int]) -> None:
    """Use another setting from the next step on; graphs of earlier steps go on with what they have saved.

    Args:
        setting: its activation policies count in the order of registration; empty leaves them as they are. Only units
            whose policy the user left open change it; the update stays as it is.
        order: units by their use, among which residents are spread.

    Raises:
        torch.OutOfMemoryError: more slots do not fit; all is as it was.
    """
    engine.recover()  # a backward pass that raised may have left units bound
    num_units = len(engine.units)
    num_slots = min(setting.k + setting.resident, num_units)
    more = num_slots - len(engine.slots.slots)
    if more > 0:
        engine.slots.extend(more, free_after=engine.lanes.compute_event())
    elif more < 0:
        engine.residency.shrink(num_slots)
    places = spread(range(len(order)), num_slots - min(setting.k, num_units))
    engine.follower.widen(num_slots, min(setting.k_prime, num_slots), frozenset(order[place] for place in places))
    engine.activations.adopt(setting.activations, setting.micro_batches)
