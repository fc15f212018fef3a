"""Planning: pure functions from an order of uses to a plan, which is data. No torch here."""

from __future__ import annotations

from lightning_superpipe.planning.actions import Action, Op, Order, Plan, Use, format_actions, parse_actions
from lightning_superpipe.planning.check import check_plan, residency
from lightning_superpipe.planning.cost import loads_forward, loads_training, loads_unchanged
from lightning_superpipe.planning.lower import forward_keep, lower_window, spread
from lightning_superpipe.planning.order import distinct_units, forward_order, training_order

__all__ = [
    "Action",
    "Op",
    "Order",
    "Plan",
    "Use",
    "check_plan",
    "distinct_units",
    "format_actions",
    "forward_keep",
    "forward_order",
    "loads_forward",
    "loads_training",
    "loads_unchanged",
    "lower_window",
    "parse_actions",
    "residency",
    "spread",
    "training_order",
]
