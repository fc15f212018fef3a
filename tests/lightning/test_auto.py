"""``auto``: a run chooses its knobs after five measured steps; nothing of its numbers changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_superpipe.tuning
from lightning_superpipe import Link, SuperpipeStrategy, attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import BudgetError, ConfigError, SuperpipeWarning
from lightning_superpipe.planning.choose import Choice
from lightning_superpipe.planning.prediction import PeakBytes
from lightning_superpipe.planning.workload import Setting
from tests.engine.tiny import Result, batches, chain, is_equal, train
from tests.parity.harness import assert_equal, run_case, trainer
from tests.parity.probe import ParityCase, ProbeModule, fixed_batches

NUM_BLOCKS, NUM_STEPS, WIDTH = 8, 12, 64
HOSTILE = Adversary(poison=True, shuffle_slots=True, max_delay_ms=1.0)
STEP = 5  # the first under the chosen plan

pytestmark = pytest.mark.filterwarnings("ignore:there is no accelerator", "ignore:.*streaming cannot pay")


def inputs(num_steps: int = NUM_STEPS) -> list[Tensor]:
    return [x.repeat(32, 1) for x in batches(num_steps, width=WIDTH)]


def run(**options: Any) -> tuple[Result, Any, list[tuple[int, int]]]:
    """Train through a streamed chain; also return the report, and (k, resident) after each forward."""
    module, windows = chain(NUM_BLOCKS, width=WIDTH, dropout=0.2), []
    with attach(module, device="cpu", **{"link": Link(), **options}) as pipe:
        module.register_forward_hook(lambda *_: windows.append((pipe._session.k, pipe._session.num_resident)))
        result = train(module, inputs())
        return result, pipe.report(), windows


@pytest.fixture(scope="module")
def plain() -> Result:
    return train(chain(NUM_BLOCKS, width=WIDTH, dropout=0.2), inputs())


@pytest.fixture(scope="module")
def peaks() -> list[int]:
    """Bytes of the run that takes least, and of the one that takes most."""
    settings: list[dict[str, Any]] = [{"k": 2, "activations": "recompute"}, {"k": NUM_BLOCKS}]
    return [int(run(**options)[1].peak.total) for options in settings]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("adversary", [None, HOSTILE])
def test_a_run_that_chooses_within_a_limit_equals_the_ordinary_one(
    plain: Result, peaks: list[int], share: float, adversary: Adversary | None
) -> None:
    small, large = peaks
    limit = int(1.15 * (small + share * (large - small)))
    result, report, _ = run(device_memory=limit, adversary=adversary)
    assert is_equal(result, plain)
    assert len(report.plan.splitlines()) == 3 and "predicted: " in str(report)
    if share > 1:
        assert (report.k, report.num_resident) == (NUM_BLOCKS, 0)
        assert "everything fits" in report.plan


def test_the_plan_changes_between_two_steps_after_five() -> None:
    _, report, windows = run(device_memory="1GiB")
    assert windows[:STEP] == [(3, 0)] * STEP
    assert windows[STEP:] == [(NUM_BLOCKS, 0)] * (NUM_STEPS - STEP)
    assert report.last_step.num_loads == NUM_BLOCKS  # once each, for weights have changed


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 4, "k_prime": 2, "resident": 1},
        {"k": 2, "resident": 3, "device_memory": "1GiB", "activations": "offload"},
    ],
)
def test_what_the_user_has_set_stays(plain: Result, options: dict[str, Any]) -> None:
    result, report, windows = run(**options)
    assert is_equal(result, plain)
    assert set(windows) == {(options["k"], options.get("resident", 0))}
    assert report.k_prime == options.get("k_prime", 1) and not report.plan


@pytest.mark.parametrize("options", [{"k": 2}, {"activations": "recompute"}, {"k_prime": 1}])
def test_one_knob_is_kept_and_the_others_are_chosen(plain: Result, options: dict[str, Any]) -> None:
    result, report, _ = run(device_memory="1GiB", **options)
    assert is_equal(result, plain) and report.plan
    assert report.k == options.get("k", report.k)
    if "activations" in options:
        assert "recompute theirs" in report.plan


def test_said_in_three_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(SuperpipeStrategy, "_tell", said.append)
    strategy = SuperpipeStrategy(device_memory="1GiB", link=Link(), step_aside=False)
    trainer("cpu", strategy, max_epochs=6).fit(ProbeModule())
    plans = [each for each in said if "predicted: " in each]
    assert plans[-1] == f"superpipe: {strategy.report().plan}"
    assert all(len(each.splitlines()) == 3 for each in plans)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
@pytest.mark.parametrize("options", [{}, {"device_memory": "1MiB", "step_aside": False}, {"device_memory": "60KiB"}])
def test_a_trainer_that_chooses_equals_the_ordinary_one(device: Any, options: dict[str, Any]) -> None:
    case = ParityCase("auto", "plans change in mid-run", ProbeModule, options={"max_epochs": 6}, stages=("fit",))
    strategy = SuperpipeStrategy(adversary=HOSTILE, **options)
    assert_equal(run_case(case, device, strategy), run_case(case, device))
    assert strategy.report().plan


def promising(plans: list[Setting], share: float) -> Callable[..., Choice]:
    """A choice that goes through plans and promises a share of what they will take."""
    choose, given = lightning_superpipe.tuning.choose, iter(plans)

    def chosen(*arguments: Any) -> Choice:
        found = choose(*arguments)
        setting = next(given, plans[-1])
        told = replace(
            found.prediction, step_s=share * found.prediction.step_s, peak=PeakBytes(slots=int(share * 2**30))
        )
        return replace(found, setting=replace(setting, update=found.setting.update), prediction=told)

    return chosen


def test_a_plan_that_misses_is_replaced_a_few_times_then_the_fastest_stays(
    plain: Result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plans = [Setting(k, 1) for k in (1, 2, 4, 5, 6, 7)]
    monkeypatch.setattr(lightning_superpipe.tuning, "choose", promising(plans, share=2**-20))
    module = chain(NUM_BLOCKS, width=WIDTH, dropout=0.2)
    many = inputs(40)
    with caplog.at_level("INFO"), attach(module, device="cpu", link=Link()) as pipe:
        result = train(module, many)
        tuner = pipe._session._tuner
        seconds = {setting.k: outcome.step_s for setting, outcome in tuner._tried.items()}
        assert pipe.report().k == min(seconds, key=seconds.__getitem__)
    assert list(seconds) == [3, 1, 2, 4]
    assert is_equal(result, train(chain(NUM_BLOCKS, width=WIDTH, dropout=0.2), many))
    said = [record.getMessage() for record in caplog.records]
    # Times of three steps may differ by more than they take; bytes do not.
    misses = [each for each in said if re.search(r"it takes [\d.]+ \w+ on the device, 1.0 KiB were predicted", each)]
    assert len(misses) == 3
    assert "the fastest of 4 plans" in said[-1]


def test_batches_that_grow_behind_the_choice_are_said_and_planned_for(caplog: pytest.LogCaptureFixture) -> None:
    grown = [x if step < STEP else x.repeat(4, 1) for step, x in enumerate(inputs(30))]
    module = chain(NUM_BLOCKS, width=WIDTH, dropout=0.2)
    with caplog.at_level("INFO"), attach(module, device="cpu", link=Link(), device_memory="8MiB") as pipe:
        result = train(module, grown)
        profile, choice = pipe.unit_profile(), pipe._session._tuner.choice
    assert is_equal(result, train(chain(NUM_BLOCKS, width=WIDTH, dropout=0.2), grown))
    said = [record.getMessage() for record in caplog.records]
    assert any(re.search(r"it takes [\d.]+ MiB on the device, [\d.]+ MiB were predicted", each) for each in said)
    assert profile is not None and len(set(profile.workload.batch_bytes)) == 2
    assert choice is not None and choice.need.activations > 1.5 * choice.prediction.peak.activations


def test_a_plan_that_was_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [Setting(2), Setting(3), Setting(2), Setting(3)]
    monkeypatch.setattr(lightning_superpipe.tuning, "choose", promising(plans, share=2**-20))
    module, windows = chain(NUM_BLOCKS, width=WIDTH), []
    with attach(module, device="cpu", link=Link()) as pipe:
        module.register_forward_hook(lambda *_: windows.append(pipe._session.k))
        train(module, inputs(30))
    changes = [after for before, after in pairwise(windows) if before != after]
    assert changes in ([2], [2, 3])  # back to the first one if that was faster, and no further


def test_a_plan_that_keeps_its_promise_stays_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_superpipe.tuning, "choose", promising([Setting(2)], share=100.0))
    with caplog.at_level("INFO"):
        _, report, windows = run()
    assert windows[-1] == (2, 0) and report.k == 2
    assert not [record for record in caplog.records if "were predicted" in record.getMessage()]


def test_where_nothing_fits_the_run_goes_on_and_says_so(plain: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> Choice:
        raise BudgetError("nothing fits.")

    monkeypatch.setattr(lightning_superpipe.tuning, "choose", refusing)
    with pytest.warns(SuperpipeWarning, match="no plan was found, the run goes on with k=3: nothing fits"):
        result, report, _ = run()
    assert is_equal(result, plain) and report.k == 3
    assert "no plan was found, the run goes on with k=3: nothing fits." in " ".join(str(report).split())


def test_without_room_for_the_chosen_slots_the_run_goes_on(
    plain: Result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning_superpipe.engine.slots import SlotPool

    def extend(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(SlotPool, "extend", extend)
    with caplog.at_level("INFO"):
        result, report, _ = run(device_memory="1GiB")
    assert is_equal(result, plain) and report.k == 3
    assert any("the device has no room for 8 slots" in record.getMessage() for record in caplog.records)


def test_evaluation_chooses_in_the_order_of_forwards() -> None:
    class Long(ProbeModule):
        def val_dataloader(self) -> Any:
            return fixed_batches(16)

    expected = trainer("cpu").validate(Long(), verbose=False)
    strategy = SuperpipeStrategy(device_memory="1MiB", link=Link(), adversary=HOSTILE)
    assert trainer("cpu", strategy).validate(Long(), verbose=False) == expected
    report = strategy.report()
    assert "everything fits" in report.plan and report.k == report.num_units


@pytest.mark.emu
def test_a_device_that_does_not_say_what_is_free_is_not_asked(emu: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"device_memory='free': 'emu:0' does not say"):
        attach(chain(NUM_BLOCKS), device=emu, device_memory="free")


def test_free_memory_is_a_limit(plain: Result) -> None:
    result, report, _ = run(device_memory="free")
    assert is_equal(result, plain) and "everything fits" in report.plan
    assert report.k == NUM_BLOCKS
