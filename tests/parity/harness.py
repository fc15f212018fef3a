"""How parity is judged: the same module, seed, data and Trainer, once with the ordinary strategy and once streamed.

The reference runs on the *same device kind* as the candidate: ``accelerator="cpu"``, the emulated device with
``SingleDeviceStrategy("emu:0")``, or a GPU (tests/gpu). Two devices round differently, and AdamW makes a full step of
the rounding of a gradient near zero, so a run on one device never judges a run on another. Reference and candidate run
one after the other in one process; everything must be equal by ``torch.equal``, there are no tolerances.

How the files fit together:

- ``probe.py``: `ProbeModule`, a small module that each probe bends in one place; `ParityCase`; the decorator that
  registers a probe. The docstring of a probe is the hazard it stands for.
- ``cases_*.py``: the probes by theme. A new probe is one class in one of them.
- ``models.py``: real architectures with tiny configurations.
- ``test_*.py``: every case on every device through several windows of ``k`` units moved ``k_prime`` at a time.

The candidate runs under an `Adversary`: memory that a unit left is filled with NaN, units are loaded into random free
slots, copies may start late. ``k=1`` alone proves little: with one slot a stale view points at the right place again
once its unit is reloaded.

After a run the module must be an ordinary one again: same classes, same Parameter objects, everything on the host
(`Outcome.layout`).
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from tests.parity.probe import Device, ParityCase, ParityModule

__all__ = [
    "ALL_UNITS",
    "Outcome",
    "Window",
    "assert_equal",
    "loads",
    "outcome",
    "placements",
    "run_case",
    "run_plain",
    "run_streamed",
    "streamed",
    "trainer",
]

SEED = 0
ALL_UNITS = 999
MARKS: dict[Device, list[pytest.MarkDecorator]] = {"cpu": [], "emu": [pytest.mark.emu], "cuda": [pytest.mark.gpu]}


class Window(NamedTuple):
    """How a candidate streams.

    Attributes:
        k: units on the device.
        k_prime: units per transfer.
        max_delay_ms: copies start up to this much later.
        activations: policy for all units.
        store: where weights and states live.
    """

    k: int
    k_prime: int
    max_delay_ms: float = 0.0
    activations: str = "keep"
    store: str = "host"

    def __str__(self) -> str:
        delay = f"-late{self.max_delay_ms:g}ms" if self.max_delay_ms else ""
        policy = f"-{self.activations}" if self.activations != "keep" else ""
        place = f"-{self.store}" if self.store != "host" else ""
        return f"k{'all' if self.k == ALL_UNITS else self.k}-kp{self.k_prime}{delay}{policy}{place}"


@dataclass(frozen=True)
class Outcome:
    """All that a run left behind, on the host.

    Attributes:
        losses: one scalar per training step.
        extra: what the case recorded, in order, and the Trainer's metrics.
        weights: the state dict after the last stage.
        layout: per module and parameter, what a user could see of the streaming after the run.
        num_loads: of a streamed run; equality means nothing if nothing was streamed.
    """

    losses: tuple[Tensor, ...]
    extra: tuple[tuple[str, Tensor], ...]
    weights: dict[str, Tensor]
    layout: tuple[str, ...]
    num_loads: int | None = None


def streamed(window: Window, seed: int = 0) -> Strategy:
    """Return the strategy under test, in hostile conditions."""
    from lightning_superpipe import SuperpipeStrategy
    from lightning_superpipe.config import Adversary

    adversary = Adversary(poison=True, shuffle_slots=True, max_delay_ms=window.max_delay_ms, seed=seed)
    return SuperpipeStrategy(
        k=window.k, k_prime=window.k_prime, activations=window.activations, store=window.store, adversary=adversary
    )


def trainer(device: Device, strategy: Strategy | None = None, **options: Any) -> L.Trainer:
    """Return a quiet Trainer on ``device``; ``strategy=None`` takes the ordinary one of that device."""
    if device == "emu":
        from tests.emu import EmuAccelerator

        options |= {"accelerator": EmuAccelerator(), "strategy": strategy or SingleDeviceStrategy("emu:0")}
    else:
        options |= {"accelerator": "gpu" if device == "cuda" else device, "strategy": strategy or "auto"}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 1,
    }
    return L.Trainer(**{"devices": 1, **quiet, **options})


def run_case(case: ParityCase, device: Device, strategy: Strategy | None = None) -> Outcome:
    """Run all stages of ``case`` and return what they left; ``strategy=None`` is the reference run."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # graphs of an earlier run are not the candidate's
    L.seed_everything(SEED, verbose=False)
    module = case.module()
    options = {name: value(device) if callable(value) else value for name, value in case.options.items()}
    run = trainer(device, strategy, **options)
    for stage in case.stages:
        quiet = {"verbose": False} if stage in ("validate", "test") else {}
        getattr(run, stage)(module, **quiet)
    return outcome(module, run)


def outcome(module: ParityModule, run: L.Trainer) -> Outcome:
    """Collect what a finished run left in its module and its Trainer."""
    metrics = [(f"metric {name}", value.detach().cpu()) for name, value in sorted(run.callback_metrics.items())]
    weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    return Outcome(tuple(module.losses), (*module.extra, *metrics), weights, tuple(_layout(module)))


def _layout(module: nn.Module) -> Iterator[str]:
    """Yield one line per module and parameter: a swapped class shows as a longer line of ancestors."""
    for name, child in module.named_modules(remove_duplicate=False):
        yield f"module {name or '(root)'}: {type(child).__name__}, {len(type(child).__mro__)} classes"
    for name, parameter in module.named_parameters(remove_duplicate=False):
        kind = f"{type(parameter).__name__} on {parameter.device.type}, strides {parameter.stride()}"
        yield f"parameter {name}: {kind}, requires_grad={parameter.requires_grad}"


@functools.cache
def run_plain(case: ParityCase, device: Device) -> Outcome:
    """Return the reference outcome, computed once per process; a reference with NaN would prove nothing."""
    result = run_case(case, device)
    bad = [label for label, value in _named(result) if value.is_floating_point() and value.isnan().any()]
    assert not bad, f"{case.name}: the reference itself is NaN at {bad[0]}"
    return result


def run_streamed(case: ParityCase, device: Device, window: Window) -> Outcome:
    """Return the candidate's outcome; each case has its own order of slots and delays."""
    strategy = streamed(window, seed=zlib.crc32(case.name.encode()))
    return replace(run_case(case, device, strategy), num_loads=loads(strategy))


def loads(strategy: Strategy) -> int:
    """Return how many units a finished run copied to the device."""
    return int(cast(Any, strategy).report().num_loads)


def placements(
    cases: Iterable[ParityCase], windows: Sequence[Window], devices: Sequence[str] = ("cpu", "emu")
) -> list[Any]:
    """Return (case, device, window) as parameters of a test, an emulated device marked as such.

    The windows of one case and device are neighbours, so that they share the reference run.
    """
    return [
        pytest.param(case, device, window, id=f"{case.name}-{device}-{window}", marks=MARKS[device])
        for case in cases
        for device in case.devices
        if device in devices
        for window in windows[: 1 if case.once else None]
    ]


def _named(result: Outcome) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its label, in the order in which a difference would first appear."""
    for step, loss in enumerate(result.losses):
        yield f"loss of step {step}", loss
    for index, (name, value) in enumerate(result.extra):
        yield f"extra {index} ({name})", value
    for name, value in result.weights.items():
        yield f"weight {name!r}", value


def first_difference(reference: Outcome, candidate: Outcome) -> str | None:
    """Return a sentence about the first tensor that is not equal, or None.

    >>> one = Outcome((torch.tensor(1.0),), (), {"w": torch.zeros(2)}, ())
    >>> first_difference(one, replace(one, weights={"w": torch.tensor([0.0, 0.5])}))
    "weight 'w' differs first: max |difference| 5.0e-01 in 1 of 2 elements (1 of 2 tensors differ)"
    """
    pairs = list(zip(_named(reference), _named(candidate), strict=False))
    labels = [[label for label, _ in _named(run)] for run in (reference, candidate)]
    if labels[0] != labels[1]:
        only = sorted(set(labels[0]) ^ set(labels[1]))
        return f"the runs recorded different things: {len(labels[0])} and {len(labels[1])} tensors, e.g. {only[:3]}"
    unequal = [(label, a, b) for (label, a), (_, b) in pairs if not torch.equal(a, b) or a.dtype != b.dtype]
    if not unequal:
        return None
    label, a, b = unequal[0]
    if a.shape != b.shape or a.dtype != b.dtype:
        what = f"{tuple(a.shape)} {a.dtype} became {tuple(b.shape)} {b.dtype}"
    else:
        gap = (_numbers(a) - _numbers(b)).abs()
        what = f"max |difference| {gap.max().item():.1e} in {(a != b).sum().item()} of {a.numel()} elements"
    return f"{label} differs first: {what} ({len(unequal)} of {len(pairs)} tensors differ)"


def _numbers(value: Tensor) -> Tensor:
    """Return ``value`` in the widest type, so that differences of any dtype can be taken."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def assert_equal(reference: Outcome, candidate: Outcome, *, ignore_extra: bool = False) -> None:
    """Raise AssertionError that names the first tensor that differs and by how much.

    Args:
        reference: of the ordinary run.
        candidate: of the streamed run.
        ignore_extra: compare losses, weights and layout only.
    """
    if ignore_extra:
        reference, candidate = replace(reference, extra=()), replace(candidate, extra=())
    difference = first_difference(reference, candidate)
    assert difference is None, difference
    changed = [f"{a} -> {b}" for a, b in zip(reference.layout, candidate.layout, strict=False) if a != b]
    assert reference.layout == candidate.layout, f"the module is not as the ordinary run leaves it: {changed[:3]}"
