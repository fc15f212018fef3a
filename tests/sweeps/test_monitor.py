from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.adapters.monitor import SuperpipeMonitor, num_samples_by_shape, num_tokens_by_shape
from tests.parity.harness import trainer
from tests.parity.probe import ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_STEPS = 8


def fit(
    folder: Path, *callbacks: L.Callback, strategy: Strategy | None = None, every: int = 2, **options: Any
) -> list[dict[str, str]]:
    """Train, and return what the CSV logger wrote, a dict for each step that was logged."""
    L.seed_everything(0, verbose=False)
    logger = CSVLogger(folder, name="", version="")
    run = trainer("cpu", strategy, logger=logger, log_every_n_steps=every, callbacks=list(callbacks), **options)
    run.fit(ProbeModule(), fixed_batches(NUM_STEPS))
    path = Path(logger.log_dir) / "metrics.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def streaming() -> SuperpipeStrategy:
    return SuperpipeStrategy(k=2)


def test_it_logs_bytes_loads_stalls_and_rates_as_often_as_the_trainer_does(tmp_path: Path) -> None:
    strategy = streaming()
    rows = fit(tmp_path, SuperpipeMonitor(), strategy=strategy, max_epochs=1, limit_val_batches=0)
    assert [int(row["step"]) for row in rows if row["superpipe/samples_per_second"]] == [1, 3, 5, 7]
    report, last = strategy.report(), rows[-1]
    assert float(last["superpipe/peak_device_bytes"]) == report.peak_device_bytes
    assert float(last["superpipe/host_bytes"]) == report.host_bytes
    assert float(last["superpipe/peak_slots_bytes"]) == report.peak.slots
    assert float(last["superpipe/stall_ms_per_step"]) >= 0
    loads = [2 * float(row["superpipe/loads_per_step"]) for row in rows]
    assert sum(loads) == report.num_loads


def test_loads_before_training_are_not_those_of_a_step(tmp_path: Path) -> None:
    unchecked, checked = [
        fit(tmp_path / str(checks), SuperpipeMonitor(), strategy=streaming(), max_epochs=1, num_sanity_val_steps=checks)
        for checks in (0, 1)
    ]
    name = "superpipe/loads_per_step"
    assert float(checked[0][name]) <= float(unchecked[0][name])  # less: a unit of the check may still be there


def test_without_streaming_it_logs_the_rates_alone(tmp_path: Path) -> None:
    rows = fit(tmp_path, SuperpipeMonitor(), max_epochs=1)
    names = {name for name in rows[-1] if name.startswith("superpipe/")}
    assert names == {"superpipe/samples_per_second", "superpipe/steps_per_second"}
    assert float(rows[-1]["superpipe/samples_per_second"]) > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_samples_and_tokens_are_counted_since_the_last_time(accumulate: int, tmp_path: Path) -> None:
    rows = fit(
        tmp_path,
        SuperpipeMonitor(num_tokens=lambda batch: 10, num_samples=lambda batch: 5),
        strategy=streaming(),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
    )
    assert len(rows) == NUM_STEPS / accumulate / 2
    for row in rows:
        rates = [float(row[f"superpipe/{name}_per_second"]) for name in ("steps", "samples", "tokens")]
        assert rates == pytest.approx([rates[0], 5 * accumulate * rates[0], 10 * accumulate * rates[0]])


def test_all_loggers_get_the_names_as_asked(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    monitor = SuperpipeMonitor(prefix="mine/")
    trainer("cpu", streaming(), logger=loggers, log_every_n_steps=1, callbacks=[monitor]).fit(
        ProbeModule(), fixed_batches(2)
    )
    for logger in loggers:
        header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
        assert "mine/loads_per_step" in header
        assert "superpipe/" not in header


class Loads(L.Callback):
    """A callback of somebody else, which might write weights."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def num_loads(*callbacks: L.Callback) -> int:
    """Loads of a run that accumulates, where undisturbed weights may stay on the device between batches."""
    strategy = streaming()
    run = trainer("cpu", strategy, callbacks=list(callbacks), accumulate_grad_batches=4, max_epochs=1)
    run.fit(ProbeModule(), fixed_batches(NUM_STEPS))
    return strategy.report().num_loads


def test_it_costs_no_load_where_a_foreign_callback_does() -> None:
    alone = num_loads()
    assert num_loads(SuperpipeMonitor()) == alone
    assert num_loads(Loads()) > alone


def test_a_monitor_changes_no_number() -> None:
    def weights(*callbacks: L.Callback) -> list[Tensor]:
        L.seed_everything(0, verbose=False)
        module = ProbeModule()
        trainer("cpu", streaming(), callbacks=list(callbacks)).fit(module, fixed_batches(3))
        return list(module.parameters())

    pairs = zip(weights(SuperpipeMonitor()), weights(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("batch", "num_samples", "num_tokens"),
    [
        (torch.zeros(4, 7, dtype=torch.long), 4, 28),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)], 4, 0),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int32), "labels": torch.zeros(2)}, 2, 10),
        ("no tensor", 0, 0),
    ],
)
def test_samples_and_tokens_by_shape(batch: Any, num_samples: int, num_tokens: int) -> None:
    assert (num_samples_by_shape(batch), num_tokens_by_shape(batch)) == (num_samples, num_tokens)


def test_the_batches_of_tokenizers_are_counted() -> None:
    from transformers import BatchEncoding

    batches = DataLoader([torch.ones(6, dtype=torch.long)] * 3, 3)  # type: ignore[arg-type]
    (batch,) = [BatchEncoding({"input_ids": ids}) for ids in batches]
    assert (num_samples_by_shape(batch), num_tokens_by_shape(batch)) == (3, 18)
