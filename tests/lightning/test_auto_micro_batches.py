"""``micro_batches="auto"``: the choice in a run splits batches where that pays, and only if it was allowed to."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import Link, attach, plan
from lightning_superpipe.errors import SuperpipeWarning
from lightning_superpipe.observe.report import Report
from lightning_superpipe.planning.workload import Setting
from tests.engine.tiny import Block, Chain, batches, chain

NUM_BLOCKS, NUM_STEPS, WIDTH, NUM_ROWS = 6, 12, 32, 512

pytestmark = pytest.mark.filterwarnings("ignore:activations took", "ignore:no plan was found", "ignore:there is no acc")


class Run(NamedTuple):
    """What a run leaves behind, and the settings that its steps had."""

    losses: list[float]
    weights: list[Tensor]
    settings: list[Setting]
    report: Report
    peak_bytes: int


def inputs() -> list[Tensor]:
    return [x.repeat(NUM_ROWS // 4, 1) for x in batches(NUM_STEPS, width=WIDTH)]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, some: list[Tensor], settings: Any = None) -> list[float]:
    losses = []
    for x in some:
        optimizer.zero_grad()
        loss = module(x).pow(2).mean()
        if settings is not None:
            settings()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=False)


def run(module: Chain | None = None, **options: Any) -> Run:
    module = module or chain(NUM_BLOCKS, width=WIDTH)
    optimizer, settings = optimizer_of(module), list[Setting]()
    with attach(module, optimizer, device="cpu", link=Link(), **options) as pipe:
        losses = train(module, optimizer, inputs(), lambda: settings.append(pipe._session._tuner.setting))
        report, profile = pipe.report(), pipe.unit_profile()
    assert profile is not None
    return Run(losses, [p.detach().clone() for p in module.parameters()], settings, report, profile.peak.total)


@pytest.fixture(scope="module")
def limit() -> int:
    """Less than the plan that takes least without micro-batches."""
    return int(0.8 * run(k=1, activations="recompute").peak_bytes)


@pytest.fixture(scope="module")
def split(limit: int) -> Run:
    return run(device_memory=limit, micro_batches="auto", update="at_once")


def test_a_limit_that_whole_batches_exceed_is_kept_in_parts(limit: int, split: Run) -> None:
    with pytest.warns(SuperpipeWarning, match=r"no plan was found.*let the batch be split \(micro_batches\)"):
        whole = run(device_memory=limit)
    assert {setting.micro_batches for setting in whole.settings} == {1} and whole.peak_bytes > limit
    parts = split.settings[-1].micro_batches
    assert split.settings[0].micro_batches == 1 < parts and split.peak_bytes <= limit
    assert f"in {parts} micro-batches" in split.report.plan.splitlines()[1]
    assert split.report.micro_batches == parts and f"batches in {parts} parts" in str(split.report)


def test_from_the_change_over_on_a_run_equals_one_with_that_number(split: Run) -> None:
    since = next(step for step, setting in enumerate(split.settings) if setting.micro_batches > 1)
    last = split.settings[-1]
    assert all(setting.activations == last.activations for setting in split.settings[since:])
    assert all(setting.micro_batches == last.micro_batches for setting in split.settings[since:])
    module = chain(NUM_BLOCKS, width=WIDTH)
    optimizer = optimizer_of(module)
    losses = train(module, optimizer, inputs()[:since])
    fixed = {f"blocks.{index}": policy for index, policy in enumerate(last.activations)}
    options: dict[str, Any] = {"k": 2, "activations": fixed, "micro_batches": last.micro_batches, "update": "at_once"}
    with attach(module, optimizer, device="cpu", link=Link(), **options):
        losses += train(module, optimizer, inputs()[since:])
    assert split.losses == losses
    assert all(map(torch.equal, split.weights, [p.detach() for p in module.parameters()]))


def test_losses_stay_close_to_those_of_the_ordinary_run(split: Run) -> None:
    module = chain(NUM_BLOCKS, width=WIDTH)
    assert split.losses == pytest.approx(train(module, optimizer_of(module), inputs()), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"device_memory": "1GiB"}])
def test_with_room_enough_no_batch_is_split(options: dict[str, Any]) -> None:
    found = run(micro_batches="auto", **options)
    module = chain(NUM_BLOCKS, width=WIDTH)
    assert {setting.micro_batches for setting in found.settings} == {1}
    assert found.losses == train(module, optimizer_of(module), inputs())


class Coupling(Block):
    """Its output for a sample depends on the others: no class tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.sum(0, keepdim=True) / NUM_ROWS)


def test_a_unit_that_couples_samples_gets_its_whole_batch_and_is_named(limit: int) -> None:
    def make() -> Chain:
        module = chain(NUM_BLOCKS, width=WIDTH)
        module.blocks[3].__class__ = Coupling
        return module

    with pytest.warns(SuperpipeWarning, match=r"'blocks\.3' gets its whole batch: .*depends on the other samples"):
        found = run(make(), device_memory=limit, micro_batches="auto")
    plain = make()
    assert found.losses == pytest.approx(train(plain, optimizer_of(plain), inputs()), rel=1e-4)


def test_a_plan_before_the_run_splits_where_that_is_allowed_and_needed(limit: int) -> None:
    module, batch = chain(NUM_BLOCKS, width=WIDTH), inputs()[0]

    def planned(**options: Any) -> Any:
        return plan(module, batch, device="rtx4090-24g", **options)

    least = planned(device_memory=1, activations="recompute", k=1)
    needed = int(least.refusal.split("needs ")[1].split("(")[1].split(" ")[0])
    refused = planned(device_memory=needed - 1)
    assert refused.choice is None and "let the batch be split (micro_batches)" in refused.refusal
    found = planned(device_memory=needed - 1, micro_batches="auto").choice
    assert found is not None and found.setting.micro_batches > 1
    assert planned(device_memory="1GiB", micro_batches="auto").choice.setting.micro_batches == 1


@pytest.mark.parametrize("micro_batches", [1, "auto"])
def test_after_a_shortage_of_memory_batches_are_split_only_where_that_is_allowed(micro_batches: Any) -> None:
    module = chain(NUM_BLOCKS, width=WIDTH)
    optimizer = optimizer_of(module)
    with attach(module, optimizer, device="cpu", link=Link(), micro_batches=micro_batches) as pipe:
        tuner, found = pipe._session._tuner, list[tuple[int, int]]()
        while tuner._shrink(0):
            found.append((tuner.setting.k, tuner.setting.micro_batches))
        losses = train(module, optimizer, inputs()[:2])
    parts = [] if micro_batches == 1 else [(2, 2), (2, 4), (2, 8), (2, 16)]
    assert found == [(2, 1), (2, 1), *parts, (1, found[-1][1])]
    plain = chain(NUM_BLOCKS, width=WIDTH)
    assert losses == pytest.approx(train(plain, optimizer_of(plain), inputs()[:2]), rel=1e-4)
