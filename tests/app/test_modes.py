"""Each mode does what its word says, with a module and data of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import yaml

from lightning_superpipe.observe import Recording
from tests.app.conftest import Ran
from tests.app.tiny import NUM_BLOCKS, NUM_SAMPLES

Command = Callable[..., Ran]
UNITS = [f"blocks.{index}" for index in range(NUM_BLOCKS)]


def weights(ran: Ran) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(ran.folder / "checkpoints" / "last.ckpt", weights_only=False)
    loaded: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return loaded


def test_train_leaves_a_row_a_checkpoint_metrics_and_the_resolved_config(superpipe: Command) -> None:
    ran = superpipe("train", "experiment=tiny", "trainer.log_every_n_steps=1")
    assert ran.status == 0
    (row,) = ran.rows
    assert (row["status"], row["k"], row["num_steps"]) == ("finished", 2, 6)
    assert row["metrics"]["val_loss"] > 0 and row["step_ms"] > 0 and row["predicted_peak_bytes"] > 0
    assert set(weights(ran)) == {f"{unit}.0.{kind}" for unit in UNITS for kind in ("weight", "bias")}
    assert "superpipe/peak_device_bytes" in (ran.folder / "metrics" / "metrics.csv").read_text().splitlines()[0]
    saved = yaml.safe_load((ran.folder / "config.yaml").read_text())
    assert saved["data"]["width"] == saved["model"]["width"] == 8
    assert "superpipe on cpu (emulated" in ran.out and str(ran.folder) in ran.out.replace("\n", "")


def test_off_is_the_ordinary_run_and_its_weights_are_equal(superpipe: Command) -> None:
    streamed = superpipe("train", "experiment=tiny", "hydra.run.dir=streamed")
    plain = superpipe("train", "experiment=tiny", "superpipe=off", "superpipe.k=1", "hydra.run.dir=z_plain")
    assert (streamed.status, plain.status) == (0, 0)
    by_folder = {row["config"]["superpipe"]["_target_"].rpartition(".")[2]: row for row in plain.all_rows}
    assert by_folder["SuperpipeStrategy"]["loss"] == by_folder["ordinary_strategy"]["loss"]
    assert by_folder["ordinary_strategy"]["config"]["superpipe"].keys() == {"_target_"}
    assert by_folder["ordinary_strategy"]["peak"] is None
    expected, trained = weights(plain), weights(streamed)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(superpipe: Command) -> None:
    whole = superpipe("train", "experiment=tiny", "trainer.max_epochs=2", "hydra.run.dir=a_whole")
    half = superpipe("train", "experiment=tiny", "trainer.max_epochs=1", "hydra.run.dir=b_half")
    path = half.folder / "checkpoints" / "last.ckpt"
    rest = superpipe("train", "experiment=tiny", "trainer.max_epochs=2", f"ckpt_path={path}", "hydra.run.dir=c_rest")
    assert [ran.status for ran in (whole, half, rest)] == [0, 0, 0]
    expected, midway, resumed = weights(whole), weights(half), weights(rest)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not any(torch.equal(midway[name], expected[name]) for name in expected)


def test_eval_measures_a_checkpoint(superpipe: Command) -> None:
    trained = superpipe("train", "experiment=tiny", "hydra.run.dir=a_trained")
    (row,) = trained.rows
    path = trained.folder / "checkpoints" / "last.ckpt"
    ran = superpipe("eval", "experiment=tiny", f"ckpt_path={path}", "hydra.run.dir=b_eval")
    assert ran.status == 0
    assert f"{row['metrics']['val_loss']:.6f}"[:7] in ran.out


def test_predict_writes_a_line_for_each_sample(superpipe: Command) -> None:
    ran = superpipe("predict", "experiment=tiny")
    assert ran.status == 0
    lines = (ran.folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == NUM_SAMPLES
    assert all(json.loads(line).keys() == {"mean"} for line in lines)


def test_plan_prints_units_bytes_and_the_plan_and_runs_nothing(superpipe: Command) -> None:
    ran = superpipe("plan", "experiment=tiny", "superpipe.k=2")
    assert ran.status == 0
    assert [unit for unit in UNITS if unit not in ran.out] == []
    assert "P0 P1 F0 E0 P2 F1 E1 P3 F2 F3 B3 E3 P1 B2 E2 P0 B1 B0" in ran.out
    assert "Window: k=2, k_prime=1" in ran.out
    assert ran.rows == [] and not (ran.folder / "checkpoints").exists()


def test_bench_times_the_steps_asked_for_and_nothing_else(superpipe: Command) -> None:
    ran = superpipe("bench", "experiment=tiny", "bench.num_warmup_steps=2", "bench.num_steps=7")
    assert ran.status == 0
    (row,) = ran.rows
    assert (row["num_steps"], "val_loss" in row["metrics"]) == (9, False)
    assert row["step_ms"] > 0
    assert {path.name for path in ran.folder.iterdir()} >= {"config.yaml", "rows"}
    assert not (ran.folder / "checkpoints").exists() and not (ran.folder / "metrics").exists()


def test_trace_opens_in_perfetto_with_the_names_of_the_units_and_draws_both_pictures(superpipe: Command) -> None:
    ran = superpipe("trace", "experiment=tiny", "superpipe=emulated", "superpipe.link.latency_ms=1")
    assert ran.status == 0
    events = json.loads((ran.folder / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"].startswith("F")} == set(UNITS)
    recording = Recording.load(ran.folder / "recording.json")
    assert recording.emulated and {span.name for span in recording.spans} >= {"F", "B", "P", "G", "stall"}
    for picture in ("timeline", "timeline-dark", "memory", "memory-dark"):
        assert (ran.folder / f"{picture}.svg").read_text().lstrip().startswith("<?xml")


def test_a_sweep_writes_a_row_for_each_job_and_refuses_without_stopping(superpipe: Command) -> None:
    ran = superpipe("-m", "bench", "experiment=tiny", "superpipe.k=1,2", "superpipe.k_prime=1,2", "bench.num_steps=1")
    assert ran.status == 0
    found = {(row["k"], row["k_prime"]): row["status"] for row in ran.all_rows}
    assert found == {(1, 1): "finished", (1, 2): "refused", (2, 1): "finished", (2, 2): "finished"}
    assert "refused: " in ran.out and "k_prime=2 is larger than k=1" in ran.out
    losses = {row["loss"] for row in ran.all_rows if row["status"] == "finished"}
    assert len(losses) == 1


@pytest.mark.parametrize("mode", ["plan", "trace"])
def test_what_streams_cannot_be_shown_where_nothing_does(superpipe: Command, mode: str) -> None:
    assert "leave superpipe=off out" in str(superpipe(mode, "experiment=tiny", "superpipe=off").status)


def test_a_step_that_never_came_is_not_traced(superpipe: Command) -> None:
    ran = superpipe("trace", "experiment=tiny", "superpipe.record_step=4", "+trainer.limit_train_batches=0")
    assert "before step 4" in str(ran.status)
