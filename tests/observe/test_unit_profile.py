"""The unit profile of a run: what is measured in its own first steps, against what was really held and computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import Link, attach
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.unit_profile import UnitProfile
from tests.engine.tiny import Chain, chain, is_equal, train

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, BATCH, NUM_BLOCKS = 64, 512, 5
FLOAT = 4
# A block saves: its input (for the norm), two statistics of each row, the norm's output, the hidden values before and
# after the activation.
BLOCK_BYTES = FLOAT * BATCH * (WIDTH + 2 + WIDTH + 2 * WIDTH + 2 * WIDTH)


def inputs(num_steps: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, WIDTH, generator=generator) for _ in range(num_steps)]


def profile_of(
    model: nn.Module, num_steps: int = 8, batches: list[Tensor] | None = None, **options: Any
) -> UnitProfile | None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with attach(model, optimizer, device="cpu", **{"k": 2, **options}) as pipe:
        for x in batches or inputs(num_steps):
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return pipe.unit_profile()


def measured(model: nn.Module, num_steps: int = 8, **options: Any) -> UnitProfile:
    profile = profile_of(model, num_steps, **options)
    assert profile is not None
    return profile


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_what_units_would_hold_is_known_under_every_policy(policy: str) -> None:
    profile = measured(chain(NUM_BLOCKS, width=WIDTH), activations=policy)
    given = FLOAT * BATCH * WIDTH
    held = [(unit.activation_bytes, unit.input_bytes) for unit in profile.workload.units]
    # The first block's input is the batch, which the caller holds anyway.
    assert held == [(BLOCK_BYTES - given, 0)] + [(BLOCK_BYTES, given)] * (NUM_BLOCKS - 1)
    assert profile.setting.activations == (policy,) * NUM_BLOCKS


def test_held_and_transient_bytes_add_up_to_the_measured_peak() -> None:
    profile = measured(chain(NUM_BLOCKS, width=WIDTH))
    work, held, peaks = profile.workload, 0, [0]
    for unit in work.units:
        peaks.append(held + unit.forward_bytes)
        held += unit.activation_bytes
    peaks.append(held + work.turn_bytes)
    for unit in reversed(work.units):
        peaks.append(held + unit.backward_bytes)
        held -= unit.activation_bytes
    assert max(peaks) == pytest.approx(profile.peak.activations, rel=0.03)


def test_units_stand_in_the_order_of_execution() -> None:
    class Backwards(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(list(self.blocks)):
                x = block(x)
            return x

    profile = measured(Backwards(NUM_BLOCKS, width=WIDTH))
    assert profile.indices == tuple(reversed(range(NUM_BLOCKS)))
    assert [unit.name for unit in profile.workload.units] == [f"blocks.{i}" for i in reversed(range(NUM_BLOCKS))]


def test_bytes_of_weights_gradients_and_states_are_those_of_the_parameters() -> None:
    model = chain(NUM_BLOCKS, width=WIDTH)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    units = measured(model).workload.units
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.blocks]
    assert [unit.gradient_bytes for unit in units] == [0, *sizes[1:]]
    for unit, block, size in zip(units, model.blocks, sizes, strict=True):
        num_steps = FLOAT * len(list(block.parameters()))  # AdamW counts them for each
        assert unit.state_bytes == (2 * size + num_steps if unit.gradient_bytes else 0)
        assert size <= unit.weight_bytes < size + 256 * len(list(block.parameters()))
    assert measured(model).workload.lowest == 1


def test_copies_of_an_emulated_link_take_what_it_says() -> None:
    profile = measured(chain(NUM_BLOCKS, width=WIDTH), link=Link(h2d_gb_s=0.01, d2h_gb_s=0.02))
    size = profile.workload.units[0].weight_bytes
    assert profile.speeds.h2d.seconds(size) >= 0.99 * size / 0.01e9  # the host may be late, never early
    assert profile.speeds.d2h.seconds(size) >= 0.99 * size / 0.02e9


def test_every_part_of_a_step_has_its_time() -> None:
    work = measured(chain(NUM_BLOCKS, width=WIDTH), link=Link()).workload
    assert all(unit.forward_s > 0 and unit.backward_s > 0 and unit.update_s > 0 for unit in work.units)
    assert work.turn_s > 0 and work.between_s > 0


def test_measuring_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(num_timed: int) -> Any:
        monkeypatch.setattr("lightning_superpipe.tuning._NUM_TIMED_STEPS", num_timed)
        model = chain(NUM_BLOCKS, width=WIDTH, dropout=0.2)
        with attach(model, device="cpu", k=2, link=Link(h2d_gb_s=1.0), activations="recompute"):
            return train(model, inputs())

    plain = train(chain(NUM_BLOCKS, width=WIDTH, dropout=0.2), inputs())
    assert is_equal(run(0), plain) and is_equal(run(6), plain)


def test_there_is_none_before_the_steps_are_over() -> None:
    assert profile_of(chain(NUM_BLOCKS, width=WIDTH), num_steps=5) is None
    assert profile_of(chain(NUM_BLOCKS, width=WIDTH), num_steps=6) is not None


def test_a_recording_comes_first() -> None:
    model = chain(NUM_BLOCKS, width=WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with attach(model, optimizer, device="cpu", k=2, record_step=3, link=Link()) as pipe:
        for x in inputs(9):
            model(x).mean().backward()
            optimizer.step()
        assert pipe.recording is not None and len(pipe.recording.spans) > NUM_BLOCKS
        assert pipe.unit_profile() is not None


def test_units_with_batch_norm_cannot_recompute_and_keep_their_batch_whole() -> None:
    model = chain(NUM_BLOCKS, width=WIDTH)
    model.blocks[2].norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]
    units = measured(model, activations={"*": "keep"}).workload.units
    assert units[2].policies == ("keep", "offload") and not units[2].splits
    assert units[1].policies == ("keep", "recompute", "offload") and units[1].splits


@pytest.mark.parametrize(
    "options", [{}, {"activations": "recompute"}, {"activations": "recompute", "micro_batches": 4}]
)
def test_bytes_that_units_are_given_count_once_for_each_measured_step(options: dict[str, Any]) -> None:
    batches = [x[:rows] for x, rows in zip(inputs(), [8, 16, 24, 32, 40, 48, 56, 64], strict=True)]
    profile = measured(chain(NUM_BLOCKS, width=WIDTH), batches=batches, **options)
    of_row = FLOAT * WIDTH * NUM_BLOCKS
    assert profile.workload.batch_bytes == tuple(of_row * rows for rows in (16, 8, 24, 32, 40))  # the second is counted


def test_passes_between_steps_are_no_batches() -> None:
    model = chain(NUM_BLOCKS, width=WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with attach(model, optimizer, device="cpu", k=2) as pipe:
        for x in inputs():
            model(x).mean().backward()
            optimizer.step()
            with torch.no_grad():
                model(x.repeat(3, 1))
        profile = pipe.unit_profile()
    assert profile is not None
    assert profile.workload.batch_bytes == (FLOAT * BATCH * WIDTH * NUM_BLOCKS,) * 5


def test_passes_without_training_have_batches_as_well() -> None:
    model = chain(NUM_BLOCKS, width=WIDTH)
    with attach(model, device="cpu", device_memory="1GiB") as pipe, torch.no_grad():
        for x in inputs():
            model(x)
        profile = pipe.unit_profile()
    assert profile is not None
    assert profile.workload.batch_bytes[:5] == (FLOAT * BATCH * WIDTH * NUM_BLOCKS,) * 5


def test_a_profile_from_before_batches_were_noted_is_read(tmp_path: Path) -> None:
    profile = measured(chain(NUM_BLOCKS, width=WIDTH))
    profile.save(tmp_path / "units.json")
    state = json.loads((tmp_path / "units.json").read_text())
    assert state["workload"].pop("batch_bytes")
    assert UnitProfile.parse(state) == replace(profile, workload=replace(profile.workload, batch_bytes=()))


def test_a_saved_profile_is_read_back_equal(tmp_path: Path) -> None:
    profile = measured(chain(NUM_BLOCKS, width=WIDTH), link=Link())
    profile.save(tmp_path / "units.json")
    assert UnitProfile.load(tmp_path / "units.json") == profile


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", json.dumps({"format": "another", "version": 1})])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SuperpipeError, match=r"other\.json' is not a unit profile"):
        UnitProfile.load(path)
