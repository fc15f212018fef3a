"""Runs of one setting: step times, peak bytes, and the unit profile of the run's own first steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jobs import Job

from lightning_superpipe import SuperpipeConfig
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning import Setting
from lightning_superpipe.session import Session

DEVICE = torch.device("cpu")
WARM_UP = 6  # two steps are counted, three are timed for the profile


@dataclass
class Run:
    """What was measured.

    Attributes:
        step_ms: of each step, from its beginning to the next one's.
        peak: device bytes by kind, in the second step: the first allocates what later ones use again.
        profile: of the first steps.
    """

    step_ms: list[float]
    peak: PeakBytes
    profile: UnitProfile
    last_loss: float

    @property
    def median_ms(self) -> float:
        """The median step."""
        return statistics.median(self.step_ms)


def run(job: Job, setting: Setting, *, num_steps: int, names: Sequence[str] = (), warm_up: int = WARM_UP) -> Run:
    """Train with one setting, as Lightning's loop does.

    Args:
        names: of the units, in order of execution; needed where the setting has policies of its own.
        warm_up: steps before those that are timed; with less than all that is measured, some are recorded as well.
    """
    gc.collect()
    model, loss_of = job.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = SuperpipeConfig(
        k=setting.k,
        k_prime=setting.k_prime,
        resident=setting.resident,
        activations=dict(zip(names, setting.activations, strict=True)) if setting.activations else "keep",
        update=setting.update,
        units=job.units,
        link=job.link,
    )
    begins = []
    session = Session(model, config, DEVICE, trains=True, optimizers=[optimizer])
    session.attend([optimizer])
    for _ in range(warm_up + num_steps + 1):
        begins.append(time.perf_counter())
        with session.step("train", is_undisturbed=True):
            loss = loss_of(model)
        session.begin_backward(is_undisturbed=True)
        loss.backward()
        session.end_backward()
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    step_ms = [1e3 * (end - begin) for begin, end in zip(begins[warm_up:], begins[warm_up + 1 :], strict=False)]
    profile = session.unit_profile()
    assert profile is not None, "three steps were timed"
    return Run(step_ms, profile.peak, profile, loss.item())


def profiled(job: Job, setting: Setting) -> UnitProfile:
    """Return the unit profile of one setting: where compute is real, of three runs that whose steps are the middle.

    A run before them is thrown away: a process's first steps are slower, memory is new and threads start.
    """
    run(job, setting, num_steps=1)
    runs = [run(job, setting, num_steps=1) for _ in range(1 if job.told else 3)]
    return sorted(runs, key=lambda each: statistics.median(each.profile.step_s))[len(runs) // 2].profile
