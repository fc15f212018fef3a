"""Planning: pure functions from an order of uses to a plan, which is data. No torch here."""

from __future__ import annotations

from lightning_superpipe.planning.actions import Action, Op, Order, Plan, Use, format_actions, parse_actions
from lightning_superpipe.planning.check import check_plan, residency
from lightning_superpipe.planning.choose import Asked, Choice, Limits, choose
from lightning_superpipe.planning.cost import loads_forward, loads_training, loads_unchanged
from lightning_superpipe.planning.free_batch import FreeBatch, free_tokens, smallest_free_batch
from lightning_superpipe.planning.lower import forward_keep, lower_window, spread
from lightning_superpipe.planning.order import distinct_units, forward_order, training_order
from lightning_superpipe.planning.prediction import HostUse, LaneSeconds, PeakBytes, Prediction
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

__all__ = [
    "Action",
    "Asked",
    "Choice",
    "Curve",
    "FreeBatch",
    "HostUse",
    "LaneSeconds",
    "Limits",
    "Op",
    "Order",
    "PeakBytes",
    "Plan",
    "Prediction",
    "Setting",
    "Speeds",
    "UnitWork",
    "Use",
    "Workload",
    "check_plan",
    "choose",
    "distinct_units",
    "format_actions",
    "forward_keep",
    "forward_order",
    "free_tokens",
    "loads_forward",
    "loads_training",
    "loads_unchanged",
    "lower_window",
    "parse_actions",
    "residency",
    "simulate",
    "smallest_free_batch",
    "spread",
    "training_order",
]
