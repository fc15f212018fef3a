"""The plan of one simulated step."""

from __future__ import annotations

from lightning_superpipe.planning.actions import Plan
from lightning_superpipe.planning.lower import forward_keep, lower_window, spread
from lightning_superpipe.planning.need import num_slots
from lightning_superpipe.planning.order import forward_order, training_order
from lightning_superpipe.planning.workload import Setting, Workload

__all__ = ["step_plan"]


def step_plan(workload: Workload, setting: Setting, resident: frozenset[int]) -> Plan:
    """Return the plan of a step that begins with these units on the device.

    Raises:
        PlanError: the setting is impossible (see :func:`lower_window`).

    >>> from lightning_superpipe.planning.workload import UnitWork
    >>> print(step_plan(Workload((UnitWork("h", 10),) * 3), Setting(k=2), frozenset()))
    P0 P1 F0 E0 P2 F1 F2 B2 E2 P0 B1 B0
    """
    n = len(workload.units)
    k, slots = min(setting.k, n), num_slots(workload, setting)
    k_prime = min(setting.k_prime, k) if setting.k_prime <= setting.k else setting.k_prime
    order = training_order(n, workload.lowest) if workload.trains else forward_order(n)
    keep = (
        spread(range(n), slots - k) if workload.trains and workload.lowest < n else forward_keep(order, slots, k_prime)
    )
    is_cyclic = workload.undisturbed and not workload.trains
    return lower_window(order, k=slots, k_prime=k_prime, resident=resident, keep=keep, cyclic=is_cyclic)
