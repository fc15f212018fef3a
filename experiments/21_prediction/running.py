"""Runs of one setting: step times, peak bytes, and the unit profile of the run's own first steps."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jobs import Job

from lightning_superpipe import attach
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning import Setting

WARM_UP = 6  # two steps are counted, three are timed for the profile


@dataclass
class Run:
    """What was measured.

    Attributes:
        step_ms: of each step, from its beginning to the next one's.
        peak: device bytes by kind.
        profile: of the first steps.
    """

    step_ms: list[float]
    peak: Any
    profile: UnitProfile | None
    last_loss: float

    @property
    def median_ms(self) -> float:
        """The median step."""
        return statistics.median(self.step_ms)


def run(job: Job, setting: Setting, *, num_steps: int, names: list[str] | None = None) -> Run:
    """Train with one setting.

    Args:
        names: of the units, in order of execution; needed where the setting has policies of its own.
    """
    gc.collect()
    model, loss_of = job.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    policies: Any = "keep"
    if setting.activations:
        assert names is not None, "policies are given by name"
        policies = dict(zip(names, setting.activations, strict=True))
    begins = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = attach(
            model,
            optimizer,
            device="cpu",
            k=setting.k,
            k_prime=setting.k_prime,
            resident=setting.resident,
            activations=policies,
            update=setting.update,
            units=job.units,
            link=job.link,
        )
        with pipe:
            for _ in range(WARM_UP + num_steps + 1):
                begins.append(time.perf_counter())
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            profile, report = pipe.unit_profile(), pipe.report()
    step_ms = [1e3 * (end - begin) for begin, end in zip(begins[WARM_UP:], begins[WARM_UP + 1 :], strict=False)]
    return Run(step_ms, report.peak, profile, loss.item())
