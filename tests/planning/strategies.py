"""Hypothesis strategies: any order, and any request that a plan can satisfy."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from lightning_superpipe.planning import Action, Op, Order, Plan, lower_window

thorough = settings(max_examples=150, deadline=None)


class Request(NamedTuple):
    """Arguments of ``lower_window``."""

    order: Order
    k: int
    k_prime: int
    resident: frozenset[int]
    keep: frozenset[int]
    cyclic: bool

    def lower(self) -> Plan:
        order, k, k_prime, resident, keep, cyclic = self
        return lower_window(order, k=k, k_prime=k_prime, resident=resident, keep=keep, cyclic=cyclic)


@st.composite
def orders(draw: st.DrawFn, max_unit: int = 7) -> Order:
    """Random uses, or pieces of chains: forwards, backwards, recomputation, the same unit again and again."""
    unit = st.integers(0, max_unit)
    op = st.sampled_from([Op.FORWARD, Op.BACKWARD])
    if draw(st.booleans()):
        return tuple(draw(st.lists(st.builds(Action, op, unit), max_size=40)))
    uses: list[Action] = []
    for first, last, kind in draw(st.lists(st.tuples(unit, unit, st.sampled_from("FBRS")), max_size=6)):
        chain = list(range(first, last + 1)) or list(range(first, last - 1, -1))
        if kind in "FB":
            uses += [Action(Op(kind), unit) for unit in chain]
        elif kind == "R":
            uses += [Action(op, unit) for unit in reversed(chain) for op in (Op.FORWARD, Op.BACKWARD)]
        else:
            uses += [Action(Op.FORWARD, first)] * len(chain)
    return tuple(uses)


@st.composite
def requests(draw: st.DrawFn, *, cyclic: bool | None = None, with_keep: bool = True) -> Request:
    """Any satisfiable request; residents and kept units may be strangers to the order."""
    k = draw(st.integers(1, 9))
    units = st.integers(0, 9)
    return Request(
        order=draw(orders()),
        k=k,
        k_prime=draw(st.integers(1, k)),
        resident=draw(st.frozensets(units, max_size=k)),
        keep=draw(st.frozensets(units, max_size=k - 1)) if with_keep else frozenset(),
        cyclic=draw(st.booleans()) if cyclic is None else cyclic,
    )
