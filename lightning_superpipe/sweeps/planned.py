"""What is known of a job's device memory before it runs."""

from __future__ import annotations

from lightning_superpipe.partition import UnitTable
from lightning_superpipe.planning.budget import MemoryNeed

__all__ = ["planned_bytes"]


def planned_bytes(units: UnitTable, k: int) -> int:
    """Return the device bytes that training needs for slots, anchors, buffers and gradients on their way home.

    Args:
        units: of the model, as the strategy shows them (``strategy.units``).
        k: most units on the device at once.

    Activations come on top: they depend on the batch.
    """
    need = MemoryNeed(
        slot_bytes=units.largest.num_bytes,
        largest_unit=units.largest.name,
        anchor_bytes=units.anchor_bytes + units.buffer_bytes,
        num_units=sum(row.role == "unit" for row in units.rows),
    )
    return need.total(min(k, need.num_units))
