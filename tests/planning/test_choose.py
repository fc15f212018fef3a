from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_superpipe.errors import BudgetError, PlanError
from lightning_superpipe.planning import (
    Asked,
    Curve,
    Limits,
    Setting,
    Speeds,
    UnitWork,
    Workload,
    choose,
    free_tokens,
    simulate,
    smallest_free_batch,
)
from lightning_superpipe.planning.choose import needed_bytes
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.margin import activation_margin
from lightning_superpipe.planning.need import device_need, host_use

from .workloads import POLICIES, machine, workloads

MIB = 1 << 20
some = settings(max_examples=25, deadline=None)


def model(n, *, seed=0, **work):
    """Blocks that are alike but for a tenth."""
    draw = random.Random(seed)
    sizes = {
        "weight_bytes": 100 * MIB,
        "gradient_bytes": 100 * MIB,
        "state_bytes": 200 * MIB,
        "activation_bytes": 60 * MIB,
        "input_bytes": 4 * MIB,
        "offload_bytes": 50 * MIB,
        "forward_bytes": 80 * MIB,
        "backward_bytes": 140 * MIB,
    }
    units = []
    for index in range(n):
        factor = 1 + 0.1 * draw.random()
        own = {name: int(size * factor) for name, size in sizes.items()}
        times = {"forward_s": 0.01 * factor, "backward_s": 0.02 * factor, "update_s": 0.008 * factor}
        units.append(UnitWork(f"h.{index}", **(own | times | work)))
    return Workload(tuple(units), anchor_bytes=50 * MIB, turn_s=0.01, turn_bytes=200 * MIB, between_s=0.001)


def link(gb_s, *, both=None):
    return Speeds(
        Curve.steady(gb_s * 1e9, 2e-5),
        Curve.steady(gb_s * 1e9, 2e-5),
        None if both is None else Curve.steady(both * 1e9),
    )


def with_margin(workload, peak):
    """Bytes of a played peak, with the room for larger batches."""
    return peak.total + int(activation_margin(workload.batch_bytes) * peak.activations)


def exhaustive(workload, speeds, limits):
    """The seconds of the best of all settings."""
    n, best = len(workload.units), None
    for policies in itertools.product(POLICIES, repeat=n):
        for k in range(1, n + 1):
            for k_prime, resident in itertools.product(range(1, k + 1), range(n - k + 1)):
                setting = Setting(k, k_prime, resident, policies)
                if needed_bytes(workload, setting).total > limits.device_bytes:
                    continue
                step = simulate(workload, speeds, setting)
                if with_margin(workload, step.peak) <= limits.device_bytes:
                    best = step.step_s if best is None else min(best, step.step_s)
    return best


@some
@given(workloads(max_units=4), st.integers(1, 3), st.floats(0.0, 1.0))
def test_no_setting_of_a_small_model_is_much_faster_than_the_choice(workload, rate, share):
    speeds = machine(rate, rate)
    least = needed_bytes(workload, Setting(1, activations=("recompute",) * len(workload.units))).total
    most = needed_bytes(workload, Setting(len(workload.units))).total
    limits = Limits(device_bytes=int(least + share * max(0, most - least)))
    best = exhaustive(workload, speeds, limits)
    if best is None:
        with pytest.raises(BudgetError):
            choose(workload, speeds, limits)
    else:
        choice = choose(workload, speeds, limits)
        assert choice.prediction.step_s <= 1.05 * best
        assert max(choice.need.total, with_margin(workload, choice.prediction.peak)) <= limits.device_bytes


@pytest.mark.parametrize("num_units", [6, 24])
@pytest.mark.parametrize(
    "speeds", [link(25), link(8), link(8, both=5), link(3)], ids=["fast", "slow", "half", "slower"]
)
def test_a_choice_keeps_its_limits_and_more_room_is_never_worse(num_units, speeds):
    workload = model(num_units)
    before = None
    for gib in (1, 1.5, 2, 3, 5, 8):
        limits = Limits(device_bytes=int(gib * (1 << 30)), host_bytes=40 << 30)
        choice = choose(workload, speeds, limits)
        assert choice.need.total == needed_bytes(workload, choice.setting).total <= limits.device_bytes
        assert choice.prediction.peak.total <= limits.device_bytes
        assert choice.prediction.host.total <= limits.host_bytes
        assert choose(workload, speeds, limits) == choice
        assert before is None or choice.prediction.step_s <= 1.01 * before
        before = choice.prediction.step_s


@pytest.mark.parametrize(
    ("batch_bytes", "margin"),
    [
        ((), 0.1),
        ((8, 8), 0.1),
        ((8, 8, 8), 0.03),
        ((8, 8, 8, 8, 8), 0.03),
        ((1000, 1001, 1000), 0.1),
        ((8, 12, 8, 8), 0.5),
        ((12, 8, 8, 8), 4 / 12),
        ((8, 12, 4, 8), 1.0),
    ],
)
def test_room_for_larger_batches_follows_what_was_seen_of_them(batch_bytes, margin):
    workload = replace(model(12), batch_bytes=batch_bytes)
    keeps = Setting(k=2)
    need, counted = needed_bytes(workload, keeps), device_need(workload, keeps)
    assert need == counted._replace(activations=counted.activations + int(margin * counted.activations))
    assert choose(workload, link(3), Limits(device_bytes=4 << 30)).need.activations == need.activations


def test_equal_batches_let_more_units_keep_than_batches_that_differ():
    counted = device_need(model(12), Setting(k=2))
    limits = Limits(device_bytes=counted.total + counted.activations // 20)
    policies = [
        choose(replace(model(12), batch_bytes=each), link(3), limits).setting.activations
        for each in [(8, 8, 8), (), (8, 12, 8)]
    ]
    num_kept = [each.count("keep") for each in policies]
    assert num_kept[0] > num_kept[1] > num_kept[2]


def test_where_everything_fits_no_unit_leaves():
    choice = choose(model(12), link(10), Limits(device_bytes=8 << 30))
    assert choice.setting == Setting(k=12, activations=("keep",) * 12)
    assert choice.fits_whole
    assert "everything fits" in choice.explain()


def test_without_a_limit_the_window_is_the_smallest_without_stalls():
    choice = choose(model(24), link(25))
    assert (choice.setting.k, choice.setting.resident, choice.fits_whole) == (2, 0, False)
    assert choice.explain().splitlines()[0] == "k=2: the smallest without stalls"
    smaller = simulate(model(24), link(25), replace(choice.setting, k=1))
    assert smaller.step_s > 1.2 * choice.prediction.step_s


def test_the_explanation_has_three_lines_with_what_stays():
    choice = choose(model(24), link(3, both=2), Limits(device_bytes=5 << 29))
    window, activations, cost = choice.explain().splitlines()
    setting = choice.setting
    assert setting.resident > 0
    assert window.startswith(f"k={setting.k}: ")
    assert f"{setting.resident} of 24 units stay resident in the spare" in window
    assert "keep" in activations or "recompute" in activations
    assert "of 2.5 GiB on the device" in cost


def test_what_was_asked_for_stays():
    policies = ("keep", None, "offload", None) * 3
    asked = Asked(k=3, k_prime=2, resident=1, activations=policies, update="in_backward")
    setting = choose(model(12), link(3), Limits(device_bytes=3 << 30), asked).setting
    assert (setting.k, setting.k_prime, setting.resident, setting.update) == (3, 2, 1, "in_backward")
    assert all(want in (None, got) for want, got in zip(policies, setting.activations, strict=True))
    open_k = choose(model(12), link(3), Limits(device_bytes=3 << 30), Asked(resident=2, k_prime=3)).setting
    assert (open_k.resident, open_k.k_prime) == (2, 3)


def test_units_get_only_policies_that_they_allow():
    workload = model(12, policies=("keep", "offload"))
    setting = choose(workload, link(25), Limits(device_bytes=1 << 30)).setting
    assert set(setting.activations) == {"keep", "offload"}


def test_a_batch_is_split_only_where_that_was_allowed_and_needed():
    workload = replace(model(12), turn_bytes=0, samples=6)
    whole_batch = Setting(k=1, activations=("recompute",) * 12)
    tight = Limits(device_bytes=needed_bytes(workload, whole_batch).total - 1)
    with pytest.raises(BudgetError, match="micro_batches"):
        choose(workload, link(25), tight)
    setting = choose(workload, link(25), tight, Asked(micro_batches=None)).setting
    assert setting.micro_batches in (2, 4)
    assert "recompute" in setting.activations
    for allowed in (tight, Limits(device_bytes=3 << 30), Limits(device_bytes=8 << 30)):
        asked = choose(workload, link(25), allowed, Asked(micro_batches=4))
        assert asked.setting.micro_batches == 4, "as asked for"
    assert (
        choose(workload, link(25), Limits(device_bytes=8 << 30), Asked(micro_batches=None)).setting.micro_batches == 1
    )


def test_a_batch_is_not_split_where_that_gains_little_or_for_units_that_couple_samples():
    workload = replace(model(12), turn_bytes=0, samples=64)
    for room in (800, 1000, 1500, 2500, 4000):
        open_parts = choose(workload, link(25), Limits(room * MIB), Asked(micro_batches=None))
        if open_parts.setting.micro_batches == 1:
            continue
        try:
            whole = choose(workload, link(25), Limits(room * MIB))
        except BudgetError:
            continue
        assert open_parts.prediction.step_s < 0.96 * whole.prediction.step_s
    coupled = replace(workload, units=tuple(replace(unit, splits=False) for unit in workload.units))
    for room in (1000, 2500):
        assert choose(coupled, link(25), Limits(room * MIB), Asked(micro_batches=None)).setting.micro_batches == 1
    lone = replace(workload, samples=1)
    assert choose(lone, link(25), Limits(1000 * MIB), Asked(micro_batches=None)).setting.micro_batches == 1


def test_host_memory_forbids_to_offload_and_refuses_what_it_cannot_hold():
    workload, room = model(24), Limits(device_bytes=int(1.2 * (1 << 30)))
    offloads = choose(workload, link(25), room)
    assert "offload" in offloads.setting.activations
    plain = host_use(workload, Setting(k=1)).total
    frugal = choose(workload, link(25), replace(room, host_bytes=plain))
    assert "offload" not in frugal.setting.activations
    with pytest.raises(BudgetError, match=r"of host memory .* host_memory allows 1\.0 GiB"):
        choose(workload, link(25), replace(room, host_bytes=1 << 30))


def test_a_refusal_names_the_least_that_would_fit():
    with pytest.raises(BudgetError) as error:
        choose(model(12), link(25), Limits(device_bytes=300 * MIB))
    message = str(error.value)
    least = needed_bytes(model(12), Setting(k=1, activations=("recompute",) * 12)).total
    assert f"({least} bytes)" in message
    assert "300.0 MiB (314572800 bytes) are allowed" in message
    assert choose(model(12), link(25), Limits(device_bytes=least)).setting.k == 1


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (Asked(k=9), "k=9"),
        (Asked(resident=8), "resident=8"),
        (Asked(activations=("keep",) * 12), "activations"),
        (Asked(k=8, activations=("keep",) * 12), "k=8, activations"),
    ],
)
def test_a_refusal_names_the_decision_that_forbids_what_would_fit(asked, named):
    with pytest.raises(BudgetError, match=rf"What you set as {named} forbids what would fit, such as k="):
        choose(model(12), link(25), Limits(device_bytes=1 << 30), asked)


def test_impossible_questions_are_refused():
    with pytest.raises(PlanError, match="no units"):
        choose(Workload(()), link(25))
    with pytest.raises(PlanError, match="3 policies for 4 units"):
        choose(model(4), link(25), asked=Asked(activations=("keep",) * 3))
    with pytest.raises(PlanError, match="k_prime=3 with k=2"):
        choose(model(4), link(25), asked=Asked(k=2, k_prime=3))


@pytest.mark.parametrize("gib", [4, 8, 16])
def test_few_settings_of_a_large_model_are_simulated(gib):
    choice = choose(model(200), link(4, both=3), Limits(device_bytes=gib << 30))
    assert choice.num_simulated <= 70


# -- the smallest batch that is free


@pytest.mark.parametrize("rate", [5.0, 20.0])
def test_files_are_free_from_the_batch_on_whose_compute_hides_them(rate):
    unit = UnitWork("h", 10, 10, 20, forward_s=1.0, backward_s=2.0)
    stored = with_files(Workload((unit,) * 16, samples=2), {"weights", "states"})
    speeds = machine(1e6, 1e6, disk_read=Curve.steady(rate), disk_write=Curve.steady(rate))
    free = smallest_free_batch(stored, speeds)
    assert free.disk == pytest.approx(2 * (20 + 20 + 30) / rate / 3)
    assert free.samples == math.ceil(free.disk)
    assert smallest_free_batch(stored, machine(1e6, 1e6)).disk == 0.0
    frozen = replace(stored, trains=False)
    assert smallest_free_batch(frozen, speeds).disk == pytest.approx(2 * 10 / rate)
    for share, is_free in ((0.8, False), (1.2, True)):
        grown = tuple(
            replace(each, forward_s=share * free.disk / 2, backward_s=share * free.disk) for each in stored.units
        )
        step = simulate(replace(stored, units=grown), speeds, Setting(k=2, update="in_backward"))
        assert (step.step_s < 1.1 * step.busy.compute) is is_free


def test_at_the_smallest_free_batch_a_step_takes_its_compute_and_below_it_does_not():
    unit = UnitWork("h", weight_bytes=10, gradient_bytes=10, forward_s=1.0, backward_s=2.0, update_s=3.0)
    speeds, workload = machine(2.0, 2.0), Workload((unit,) * 40)
    free = smallest_free_batch(workload, speeds)
    assert (free.forward, free.backward, free.update, free.samples) == (5.0, 2.5, 1.0, 5.0)

    def stalls(samples):
        grown = replace(unit, forward_s=samples * unit.forward_s, backward_s=samples * unit.backward_s)
        step = simulate(replace(workload, units=(grown,) * 40), speeds, Setting(k=2))
        return step.stall_s / step.step_s

    assert stalls(5) < 0.03 < 0.2 < stalls(3)


def test_the_formula_for_tokens_agrees_with_measured_units():
    flops, num_bytes, rate, tokens = 1e12, 2, 1e9, 100
    parameters = 1_000_000
    unit = UnitWork(
        "h",
        weight_bytes=num_bytes * parameters,
        gradient_bytes=num_bytes * parameters,
        forward_s=2 * parameters * tokens / flops,
        backward_s=4 * parameters * tokens / flops,
    )
    workload = Workload((unit,) * 3, samples=1, tokens=tokens)
    free = smallest_free_batch(workload, machine(rate, rate), recompute=True)
    forward, backward = free_tokens(flops, num_bytes, rate, recompute=True)
    assert free.forward * tokens == pytest.approx(forward)
    assert free.backward * tokens == pytest.approx(backward)
    assert free.tokens == free.samples * tokens
    with pytest.raises(PlanError, match="link_bytes_per_s=0"):
        free_tokens(flops, num_bytes, 0)


# -- updates on the device

SHARED = {"update_bytes": 600 * MIB, "kernel_bytes": 100 * MIB}


def with_updates_there(n):
    return replace(model(n, update_on_device_s=0.001), **SHARED)


def test_a_share_that_was_asked_for_stays_in_every_setting():
    asked = Asked(update_on_device=0.25)
    choice = choose(with_updates_there(12), link(5.0), Limits(3000 * MIB), asked)
    assert choice.setting.update_on_device == 0.25
    assert "update after_backward, 25% of the units on the device" in choice.explain()
    assert choice.prediction == simulate(with_updates_there(12), link(5.0), choice.setting)


def test_updates_on_the_device_take_memory():
    work, none, quarter = with_updates_there(12), Setting(3), Setting(3, update_on_device=0.25)
    assert needed_bytes(work, quarter).total - needed_bytes(work, none).total == sum(SHARED.values())
    peaks = [simulate(work, link(5.0), setting).peak for setting in (none, quarter)]
    assert peaks[1].anchors - peaks[0].anchors == SHARED["update_bytes"]
    # Without a unit whose update can run there, there is nothing to keep memory for.
    assert needed_bytes(replace(model(12), **SHARED), quarter) == needed_bytes(replace(model(12), **SHARED), none)


def test_what_does_not_fit_beside_updates_on_the_device_is_refused():
    work = with_updates_there(12)
    limits, asked = Limits(1000 * MIB), Asked(update_on_device=0.25)
    assert choose(work, link(5.0), limits).need.total <= 1000 * MIB
    with pytest.raises(BudgetError, match="of anchors and updates on the device"):
        choose(work, link(5.0), limits, asked)
    assert choose(work, link(5.0), Limits(1400 * MIB), asked).need.total > 1000 * MIB
