"""Peak bytes of every kind of plan, predicted from the unit profile of a run that keeps all: those that are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.config import Link, SuperpipeConfig
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning import Curve, Setting, Speeds, simulate
from lightning_superpipe.session import Session
from tests.engine.tiny import CPU, Block, Chain

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_UNITS, WIDTH, BATCH = 8, 64, 512
SHARE = 0.03
EVEN = (1,) * NUM_UNITS
UNEVEN = (1, 2, 3, 1, 2, 3, 2, 1)  # blocks of each unit
LAST_IS_SMALL = (1, 1, 3, 1)

# Device and host share their memory: a copy is over before the next unit computes.
AT_ONCE = Speeds(h2d=Curve.steady(1e15), d2h=Curve.steady(1e15), use_s=1e-6)
LATE = Speeds(h2d=Curve.steady(1e15), d2h=Curve.steady(2e6), use_s=1e-6)
LATE_LINK = Link(h2d_gb_s=1e3, d2h_gb_s=2e-3)
"""What a unit saves takes nearly half a second home or longer, and its compute a few milliseconds."""

POLICIES = {
    "keep": ("keep",) * NUM_UNITS,
    "recompute": ("recompute",) * NUM_UNITS,
    "offload": ("offload",) * NUM_UNITS,
    "mixed": tuple(("recompute", "keep", "offload")[index % 3] for index in range(NUM_UNITS)),
    "first offload": ("offload",) * 4 + ("keep",) * 4,
    "last offload": ("keep",) * 4 + ("offload",) * 4,
    "recompute, keep": ("recompute",) * 4 + ("keep",) * 4,
    "offload, recompute": ("offload",) * 4 + ("recompute",) * 4,
    "recompute, offload": ("recompute",) * 4 + ("offload",) * 4,
}
WINDOWS = [Setting(1), Setting(3), Setting(3, 2), Setting(2, resident=3), Setting(NUM_UNITS)]


def model(depths: tuple[int, ...]) -> Chain:
    """A chain of units, each of so many blocks."""
    torch.manual_seed(0)
    module = Chain(0)
    module.blocks = nn.ModuleList(nn.Sequential(*(Block(WIDTH) for _ in range(depth))) for depth in depths)
    return module


def inputs(num_steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        yield torch.randn(BATCH, WIDTH, generator=generator)


def measured(depths: tuple[int, ...], **options: Any) -> tuple[UnitProfile, PeakBytes]:
    """Train some steps, and return what was measured in them, and the peak of those that were counted."""
    module = model(depths)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    config = SuperpipeConfig(units="Sequential", **{"k": 2, "resident": 0, **options})
    session = Session(module, config, CPU, trains=True, optimizers=[optimizer])
    session.attend([optimizer])
    for x in inputs(8):
        with session.step("train"):
            loss = module(x).square().mean()
        session.begin_backward(is_undisturbed=False)
        loss.backward()
        session.end_backward()
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    found = session.unit_profile()
    assert found is not None
    return found, session.report().peak


@cache
def kept(depths: tuple[int, ...]) -> UnitProfile:
    """What predictions start from: all units keep, under a small window."""
    return measured(depths, activations="keep")[0]


def counted(depths: tuple[int, ...], setting: Setting, **options: Any) -> PeakBytes:
    """Return what a run with a setting held at its peak, counted operation by operation."""
    return measured(
        depths,
        k=setting.k,
        k_prime=setting.k_prime,
        resident=setting.resident,
        activations={f"blocks.{index}": policy for index, policy in enumerate(setting.activations)},
        micro_batches=setting.micro_batches,
        update_on_device=setting.update_on_device,
        **options,
    )[1]


def predicted(depths: tuple[int, ...], setting: Setting, speeds: Speeds = AT_ONCE) -> PeakBytes:
    return simulate(kept(depths).workload, speeds, setting).peak


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("depths", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "recompute"])
def test_every_mix_of_policies(name: str, depths: tuple[int, ...]) -> None:
    setting = Setting(2, activations=POLICIES[name])
    assert predicted(depths, setting) == counted(depths, setting)


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("depths", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_where_all_recompute_the_end_of_a_forward_counts_too(depths: tuple[int, ...]) -> None:
    """It is not computed again, and here it is where a block takes most."""
    setting = Setting(2, activations=POLICIES["recompute"])
    found, output_bytes = counted(depths, setting).total, 4 * WIDTH * BATCH
    assert found <= predicted(depths, setting).total <= found + output_bytes


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["keep", "offload", "mixed"])
def test_every_window(name: str, window: Setting) -> None:
    setting = replace(window, activations=POLICIES[name])
    assert predicted(UNEVEN, setting) == counted(UNEVEN, setting)


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("depths", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("name", ["recompute", "recompute, keep", "recompute, offload"])
def test_batches_in_parts(name: str, num_parts: int, depths: tuple[int, ...]) -> None:
    setting = Setting(2, activations=POLICIES[name], micro_batches=num_parts)
    assert predicted(depths, setting).total == pytest.approx(counted(depths, setting).total, rel=SHARE)


@pytest.mark.parametrize("policies", [("offload",) * 4, ("keep", "offload", "offload", "recompute")], ids=str)
def test_batches_that_are_late(policies: tuple[str, ...]) -> None:
    """What backward has used stays on the device, for it is on its way home still."""
    setting = Setting(4, activations=policies)
    found = counted(LAST_IS_SMALL, setting, link=LATE_LINK).total
    assert predicted(LAST_IS_SMALL, setting, LATE).total == pytest.approx(found, rel=SHARE)
    assert predicted(LAST_IS_SMALL, setting).total < (1 - SHARE) * found, "they would be gone, were they not late"


@pytest.mark.usefixtures("copies_at_once")
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_updates_on_the_device(share: float) -> None:
    setting = Setting(2, activations=POLICIES["offload"], update_on_device=share)
    profile, _ = measured(UNEVEN, activations="keep", update_on_device=share)
    found = counted(UNEVEN, setting, record_step=6)  # the first step makes states, the second memory for updates
    assert simulate(profile.workload, AT_ONCE, setting).peak == found
    assert found.anchors == profile.workload.update_bytes > 0
