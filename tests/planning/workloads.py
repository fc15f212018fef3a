"""Hypothesis strategies: workloads, machines and settings, with whole seconds so that a slow simulator can keep up."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_superpipe.planning import Curve, Setting, Speeds, UnitWork, Workload

POLICIES = ("keep", "recompute", "offload")
BATCHES = ((), (8, 8, 8, 8), (8, 9, 8, 8), (8, 16, 4, 8))  # nothing is known, equal, nearly, of many lengths


def machine(h2d_bytes_per_s: float = 1.0, d2h_bytes_per_s: float = 1.0, **more) -> Speeds:
    """A link of so many bytes per second each way."""
    return Speeds(_line(h2d_bytes_per_s), _line(d2h_bytes_per_s), **more)


def _line(bytes_per_s: float) -> Curve:
    return Curve(((0, 0.0), (1 << 20, (1 << 20) / bytes_per_s)))


@st.composite
def units(draw: st.DrawFn, index: int) -> UnitWork:
    weight = draw(st.integers(1, 6))
    activation = draw(st.integers(1, 6))
    return UnitWork(
        f"h.{index}",
        weight_bytes=weight,
        gradient_bytes=draw(st.sampled_from([weight, weight, 1, 0])),
        state_bytes=2 * weight,
        forward_s=float(draw(st.integers(0, 5))),
        backward_s=float(draw(st.integers(0, 8))),
        update_s=float(draw(st.integers(0, 6))),
        activation_bytes=activation,
        input_bytes=draw(st.integers(0, activation)),
        offload_bytes=draw(st.integers(1, activation)),
        forward_bytes=activation + draw(st.integers(0, 4)),
        backward_bytes=draw(st.integers(0, 9)),
    )


@st.composite
def workloads(draw: st.DrawFn, max_units: int = 7) -> Workload:
    n = draw(st.integers(1, max_units))
    return Workload(
        tuple(draw(units(index)) for index in range(n)),
        anchor_bytes=draw(st.integers(0, 5)),
        turn_s=float(draw(st.integers(0, 4))),
        turn_bytes=draw(st.integers(0, 20)),
        between_s=float(draw(st.integers(0, 4))),
        lowest=draw(st.integers(0, n - 1)),
        batch_bytes=draw(st.sampled_from(BATCHES)),
    )


@st.composite
def settings_of(draw: st.DrawFn, workload: Workload) -> Setting:
    n = len(workload.units)
    k = draw(st.integers(1, n))
    return Setting(
        k=k,
        k_prime=draw(st.integers(1, k)),
        resident=draw(st.integers(0, n - k)),
        activations=tuple(draw(st.lists(st.sampled_from(POLICIES), min_size=n, max_size=n))),
        update=draw(st.sampled_from(["after_backward", "in_backward", "at_once"])),
    )


@st.composite
def problems(draw: st.DrawFn, max_units: int = 7) -> tuple[Workload, Setting]:
    workload = draw(workloads(max_units))
    return workload, draw(settings_of(workload))
