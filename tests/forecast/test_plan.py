"""A plan before the run: what it says, what it refuses, and that it needs neither the machine nor memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import lightning_superpipe
from lightning_superpipe import Disk, plan
from lightning_superpipe.errors import ConfigError, PartitionError, SuperpipeError, UnsupportedError
from lightning_superpipe.forecast.plan import Forecast
from lightning_superpipe.observe import DiskRate, DiskRoute, MachineProfile
from lightning_superpipe.planning.simulate import simulate
from lightning_superpipe.recipes.fine_tuning import FineTuning

WIDTH, NUM_BLOCKS = 32, 6


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class LooksAtValues(Network):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y if float(y.sum()) > 0 else -y


def forecast(machine: MachineProfile, module: nn.Module | None = None, rows: int = 64, **options: Any) -> Forecast:
    return plan(module or Network(), torch.ones(rows, WIDTH), device=machine, **options)


def test_windows_are_simulated_and_the_chosen_one_is_marked(small_machine: MachineProfile) -> None:
    found = forecast(small_machine, device_memory="1MiB")
    assert {(window.setting.k, window.setting.k_prime) for window in found.windows} >= {(1, 1), (2, 1), (4, 2), (6, 3)}
    assert found.choice is not None and found.refusal == ""
    (chosen,) = [window for window in found.windows if window.is_chosen]
    assert chosen.setting == found.choice.setting and chosen.fits
    for window in found.windows:
        assert window.prediction == simulate(found.workload, found.speeds, window.setting)
    text = str(found)
    assert "<- chosen" in text and "Host memory: " in text and "batch x copies / compute" in text
    assert found.choice.explain() in text


class Scaled(Network):
    """With a parameter outside all units."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1000, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x) * self.scale.mean(0)
        return y


def test_updates_outside_units_hold_the_loop_up_and_what_is_not_counted_is_said(small_machine: MachineProfile) -> None:
    without, with_it = (forecast(small_machine, kind(), k=2, resident=0) for kind in (Network, Scaled))
    took = small_machine.update_seconds("float32", 1000 * WIDTH)
    assert took is not None
    assert with_it.workload.between_s == pytest.approx(took)
    assert without.workload.between_s == 0.0
    assert "Not counted: the loop," in str(with_it)


def test_knobs_of_the_user_stay(small_machine: MachineProfile) -> None:
    found = forecast(small_machine, k=3, k_prime=2, activations="recompute", resident=0)
    assert found.choice is not None
    setting = found.choice.setting
    assert (setting.k, setting.k_prime, setting.resident) == (3, 2, 0)
    assert set(setting.activations) == {"recompute"} and found.recomputes
    assert [window.setting for window in found.windows] == [setting]


def test_what_does_not_fit_is_said_with_the_bytes(small_machine: MachineProfile) -> None:
    found = forecast(small_machine, device_memory=5000)
    assert found.choice is None and not any(window.fits for window in found.windows)
    assert "does not fit" in str(found) and "(5000 bytes)" in found.refusal


def test_samples_are_counted_and_tokens_only_where_there_are_some(small_machine: MachineProfile) -> None:
    assert (forecast(small_machine, rows=7).workload.samples, forecast(small_machine).workload.tokens) == (7, 0)
    embedded = nn.Sequential(nn.Embedding(9, WIDTH), Network())
    tokens = plan(embedded, torch.ones(3, 5, dtype=torch.long), device=small_machine)
    assert (tokens.workload.samples, tokens.workload.tokens) == (3, 15)


def test_more_work_takes_longer_and_streaming_is_free_from_a_batch_on(small_machine: MachineProfile) -> None:
    slow = replace(small_machine, copies=tuple(_slower(copy) for copy in small_machine.copies))
    few, many = (forecast(slow, rows=rows, k=2) for rows in (1 << 8, 1 << 12))
    assert few.choice is not None and many.choice is not None
    assert many.choice.prediction.step_s > few.choice.prediction.step_s
    fast = forecast(small_machine, rows=1 << 12, k=2)
    assert many.free.forward == pytest.approx(100 * fast.free.forward)
    assert many.free.samples > fast.free.samples


def _slower(copy: Any) -> Any:
    return replace(copy, seconds=tuple(100 * each for each in copy.seconds))


def test_optimizers_count_by_their_states(small_machine: MachineProfile) -> None:
    def host_states(make: Any) -> int:
        return forecast(small_machine, optimizer=make).step.host.states

    num_bytes = sum(parameter.nbytes for parameter in Network().parameters())
    assert host_states(torch.optim.AdamW) == 2 * num_bytes
    assert host_states(lambda parameters: torch.optim.SGD(parameters, lr=0.1)) == 0
    assert "Assumed: AdamW" in str(forecast(small_machine))


def test_a_large_model_is_planned_within_seconds_and_without_its_memory(small_machine: MachineProfile) -> None:
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    with torch.device("meta"):
        module = FineTuning(config={**shape, "num_attention_heads": 32}, dtype="bfloat16")
    ids = torch.ones(2, 512, dtype=torch.long)
    found = plan(module, {"input_ids": ids, "labels": ids, "attention_mask": ids}, device=small_machine, k=2)
    assert found.workload.tokens == 1024
    assert sum(unit.weight_bytes for unit in found.workload.units) > 12 << 30
    assert psutil.Process().memory_info().rss - before < 2 << 30
    assert time.perf_counter() - began < 120  # a guard against computing it, not a figure
    work = sum(op.num_flops * n for unit in found.step.units for op, n in unit.tape.forward.operations.items())
    assert work == pytest.approx(2 * 6.5e9 * 1024, rel=0.1)


def test_half_precision_takes_half_the_activations(small_machine: MachineProfile) -> None:
    whole, half = (forecast(small_machine, rows=4096, precision=word, k=2) for word in ("32-true", "bf16-true"))
    activations = [sum(unit.activation_bytes for unit in each.workload.units) for each in (whole, half)]
    assert activations[1] == pytest.approx(activations[0] / 2, rel=0.02)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "rtx409024g"}, ConfigError, "did you mean 'rtx4090-24g'"),
        ({"kprime": 2}, ConfigError, "did you mean 'k_prime'"),
        ({"units": "nothing"}, PartitionError, "matches none"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(Network(), torch.ones(2, WIDTH), **{"device": "cpu-2cores", **options})


def test_a_step_that_looks_at_activations_is_refused_unless_another_is_given(small_machine: MachineProfile) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be played.*step="):
        forecast(small_machine, LooksAtValues())
    assert forecast(small_machine, LooksAtValues(), step=lambda module, x: module.blocks(x).sum()).workload.units


def test_a_profile_without_compute_is_refused(small_machine: MachineProfile) -> None:
    with pytest.raises(SuperpipeError, match="no rates of compute"):
        forecast(replace(small_machine, computes=()))


def test_a_machine_without_updates_takes_those_of_this_host(small_machine: MachineProfile) -> None:
    found = forecast(replace(small_machine, updates=()))
    assert any("updates as fast as on this machine's host" in remark for remark in found.remarks)
    assert all(unit.update_s > 0 for unit in found.workload.units)


def test_published_profiles_say_so(small_machine: MachineProfile) -> None:
    text = str(forecast(replace(small_machine, note="Published measurements, not ours", sources=("https://a.b/c",))))
    assert "Published measurements, not ours: https://a.b/c" in text


def test_the_calls_are_exported() -> None:
    assert {"plan", "profile_machine", "machine_profile"} <= set(lightning_superpipe.__all__)


def test_files_take_time_and_no_host_memory(small_machine: MachineProfile) -> None:
    slow = tuple(DiskRate(route, True, 1 << 20, (1.0,)) for route in DiskRoute)  # a megabyte takes a second
    machine = replace(small_machine, disks=slow)
    plain, files = forecast(machine), forecast(machine, store="disk")
    assert files.windows[0].prediction.busiest == "disk"
    assert files.windows[0].prediction.step_s > 10 * plain.windows[0].prediction.step_s
    assert files.step.host.total < plain.step.host.total
    assert "no unit stays in host memory" in str(files)
    roomy = forecast(machine, store="disk", host_memory=files.step.host.total + plain.step.host.total // 2)
    assert 0 < roomy.windows[0].prediction.busy.disk < files.windows[0].prediction.busy.disk
    assert f"of {NUM_BLOCKS} units stay in host memory" in str(roomy)
    unknown = forecast(replace(small_machine, disks=()), store="disk")
    assert "the profile has no disk" in str(unknown)
    assert (
        unknown.choice is not None
        and unknown.choice.prediction.disk.written_bytes > 0 == unknown.choice.prediction.busy.disk
    )


def test_wear_of_a_drive_is_part_of_the_plan(small_machine: MachineProfile) -> None:
    everything = {"weights": "disk", "states": "disk", "gradients": "disk", "activations": "disk"}
    trained = sum(parameter.nbytes for parameter in Network().parameters())
    written = {}
    for name, options in {"kept": {}, "offloaded": {"activations": "offload"}}.items():
        found = forecast(small_machine, store=everything, disk=Disk(endurance_tb=1e-3), k=2, rows=256, **options)
        assert found.choice is not None
        disk = found.choice.prediction.disk
        assert f"Files: {disk}: {disk.written_bytes / 1e9:.2e} of the drive's life." in str(found)
        assert disk.written_bytes >= 4 * trained  # weights, two states, gradients
        written[name] = disk.written_bytes
    assert written["offloaded"] - written["kept"] >= (NUM_BLOCKS - 1) * 256 * WIDTH * 4
    assert "set disk.endurance_tb to see" in str(forecast(small_machine, store="disk"))
    frozen = Network()
    frozen.blocks[:-1].requires_grad_(False)
    frozen.blocks[-1][0].weight.requires_grad_(False)
    assert "the drive does not wear" in str(forecast(small_machine, frozen, store="disk"))
    assert "Files: " not in str(forecast(small_machine))


def test_a_share_of_updates_on_the_device_counts_in_every_window(small_machine: MachineProfile) -> None:
    without, with_it = (forecast(small_machine, update_on_device=share, k=2, resident=0) for share in (0.0, 0.5))
    assert {window.setting.update_on_device for window in with_it.windows} == {0.5}
    assert with_it.choice is not None and "50% of the units on the device" in str(with_it)
    block = 4 * (WIDTH * WIDTH + WIDTH)
    for before, now in zip(without.windows, with_it.windows, strict=True):
        kept = now.prediction.peak.anchors - before.prediction.peak.anchors
        assert 2 * 4 * block <= kept < 2 * 4 * block * 2, "weights, gradients and two states of two units"
        assert now.prediction.h2d_bytes > before.prediction.h2d_bytes


def test_an_optimizer_that_cannot_be_split_updates_nothing_on_the_device(small_machine: MachineProfile) -> None:
    with pytest.raises(UnsupportedError, match=r"update_on_device=0\.5 cannot be used with LBFGS"):
        forecast(small_machine, update_on_device=0.5, optimizer=torch.optim.LBFGS)


def test_a_share_that_the_run_will_choose_is_said(small_machine: MachineProfile) -> None:
    assert "update_on_device='auto' is decided in the run" in str(forecast(small_machine, update_on_device="auto"))
