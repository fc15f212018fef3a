"""How many units fit: the device bytes that a window needs, and the largest window under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from humanize import naturalsize

from lightning_superpipe.errors import BudgetError

__all__ = ["AUTO_K", "KeptBytes", "MemoryNeed", "choose_k", "choose_residents", "refuse_updates"]

AUTO_K = 3
"""One unit computes, one arrives, one leaves: more slots only help where copies are irregular."""

_NUM_GRADIENT_SLOTS = 2


class KeptBytes(NamedTuple):
    """Device bytes beside the slots that stay as they are from step to step.

    Attributes:
        anchors: permanent copies.
        updates: what updates on the device keep there, if any unit is updated there.
        kernels: most that their kernels take beside that.
    """

    anchors: int = 0
    updates: int = 0
    kernels: int = 0


@dataclass(frozen=True)
class MemoryNeed:
    """Device bytes that are known before the first step; activations come on top.

    Attributes:
        slot_bytes: of the largest unit.
        largest_unit: its name.
        anchor_bytes: parameters and buffers with a permanent device copy.
        num_units: units of the model.
        trains: gradients need room as well.
        trained_bytes: of the parameters of one unit that get gradients, at most; None for all of the slot.
        update_bytes: what updates on the device take beside the slots.
    """

    slot_bytes: int
    largest_unit: str
    anchor_bytes: int
    num_units: int
    trains: bool = True
    trained_bytes: int | None = None
    update_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        """Room for gradients on their way home: those of the unit that computes, and of the one before."""
        largest = self.slot_bytes if self.trained_bytes is None else self.trained_bytes
        return _NUM_GRADIENT_SLOTS * largest if self.trains else 0

    def total(self, k: int) -> int:
        """Bytes that a window of ``k`` units needs.

        >>> MemoryNeed(slot_bytes=10, largest_unit="h", anchor_bytes=5, num_units=8).total(k=3)
        55
        """
        return k * self.slot_bytes + self.anchor_bytes + self.gradient_bytes + self.update_bytes


def choose_k(k: int | None, need: MemoryNeed, budget_bytes: int | None, *, k_prime: int) -> int:
    """Return the window to use: ``k`` as asked, or a small one that fits when None; never more than all units.

    Raises:
        BudgetError: the budget is too small; the message holds the numbers and what would fit.

    >>> choose_k(None, MemoryNeed(slot_bytes=10, largest_unit="h", anchor_bytes=0, num_units=8), 45, k_prime=1)
    2
    """
    asked = min(max(AUTO_K, k_prime + 1) if k is None else k, need.num_units)
    if budget_bytes is None or need.total(asked) <= budget_bytes:
        return asked
    fits = (budget_bytes - need.total(0)) // need.slot_bytes if need.slot_bytes else 0
    if k is None and fits >= max(1, k_prime):
        return min(asked, fits)
    raise BudgetError(_refusal(asked, need, budget_bytes, fits, k_prime))


def choose_residents(asked: int | None, k: int, need: MemoryNeed, budget_bytes: int | None, used_bytes: int) -> int:
    """Return how many units stay on the device beside the window.

    Args:
        asked: as many, or those that spare memory holds when None.
        k: the window.
        used_bytes: what a step takes without them, activations included, or what is known of it.

    Raises:
        BudgetError: as many were asked for, but they do not fit.

    >>> need = MemoryNeed(slot_bytes=10, largest_unit="h", anchor_bytes=0, num_units=8)
    >>> choose_residents(None, 2, need, 100, used_bytes=75), choose_residents(None, 2, need, None, used_bytes=75)
    (2, 0)
    """
    most = need.num_units - k
    if asked is None:
        spare = 0 if budget_bytes is None or not need.slot_bytes else (budget_bytes - used_bytes) // need.slot_bytes
        return max(0, min(most, spare))
    if budget_bytes is not None and (total := used_bytes + min(asked, most) * need.slot_bytes) > budget_bytes:
        fits = max(0, (budget_bytes - used_bytes) // need.slot_bytes)
        raise BudgetError(
            f"resident={asked} beside k={k} needs {_size(total)} ({total} bytes) of device memory without activations, "
            f"{_size(need.slot_bytes)} for each; device_memory allows {_size(budget_bytes)} ({budget_bytes} bytes). "
            f"Use resident<={fits}, or 'auto'."
        )
    return min(asked, most)


def refuse_updates(num_slots: int, need: MemoryNeed, budget_bytes: int | None) -> None:
    """Raise if updates on the device do not fit beside the slots.

    Raises:
        BudgetError: with the bytes needed and allowed.

    >>> refuse_updates(2, MemoryNeed(slot_bytes=10, largest_unit="h", anchor_bytes=0, num_units=8, update_bytes=9), 49)
    """
    total = need.total(num_slots)
    if budget_bytes is not None and need.update_bytes and total > budget_bytes:
        raise BudgetError(
            f"update_on_device takes {_size(need.update_bytes)} ({need.update_bytes} bytes) of device memory for "
            f"gradients and states of the largest unit, {need.largest_unit!r}; with {num_slots} slots that makes "
            f"{_size(total)} ({total} bytes), but device_memory allows {_size(budget_bytes)} ({budget_bytes} bytes). "
            f"Leave update_on_device out, mark smaller units with `units=`, or allow {total} bytes."
        )


def _refusal(k: int, need: MemoryNeed, budget_bytes: int, fits: int, k_prime: int) -> str:
    kinds = f"{_size(k * need.slot_bytes)} of slots (largest unit: {need.largest_unit!r}, {_size(need.slot_bytes)})"
    if need.anchor_bytes:
        kinds += f", {_size(need.anchor_bytes)} of anchors and buffers"
    if need.gradient_bytes:
        kinds += f", {_size(need.gradient_bytes)} for gradients on their way home"
    message = (
        f"k={k} needs {_size(need.total(k))} ({need.total(k)} bytes) of device memory before any activation: {kinds}; "
        f"device_memory allows {_size(budget_bytes)} ({budget_bytes} bytes). "
    )
    smallest = need.total(max(1, k_prime))
    if fits >= max(1, k_prime):
        return message + f"Use k<={fits}, or allow {need.total(k)} bytes."
    if need.slot_bytes > budget_bytes:
        return message + (
            f"Unit {need.largest_unit!r} alone is larger than the budget: mark smaller units with `units=`, "
            f"or allow at least {smallest} bytes."
        )
    return message + f"No k fits with k_prime={k_prime}: allow at least {smallest} bytes, or mark smaller units."


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
