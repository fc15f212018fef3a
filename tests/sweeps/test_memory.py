"""Twenty jobs in one process: after each the memory is what it was before the first."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_superpipe import SuperpipeConfig, SuperpipeStrategy
from lightning_superpipe.sweeps import JobResult, Status, record_job
from tests.engine.test_host_memory import resident_bytes
from tests.parity.harness import trainer
from tests.parity.probe import Device

WIDTH, NUM_LAYERS = 512, 6
STATE_BYTES = 16 * NUM_LAYERS * WIDTH * WIDTH  # weights, gradients and two moments
NUM_JOBS = 20

pytestmark = pytest.mark.filterwarnings("ignore")


class Wide(L.LightningModule):
    """So wide that one job left over would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)])

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def job(device: Device, k: int, k_prime: int, fails: bool) -> JobResult:
    """Train for two steps, or fail in the middle."""
    strategy = SuperpipeStrategy(config=SuperpipeConfig(k=k, k_prime=k_prime))
    run = trainer(device, strategy, max_epochs=1, num_sanity_val_steps=0)
    module = Wide()
    if fails:
        module.register_forward_pre_hook(partial(_fail, run))
        module.layers.register_forward_pre_hook(partial(_fail, run))
    run.fit(module, DataLoader(torch.ones(4, WIDTH), 2))  # type: ignore[arg-type]
    return JobResult(float(run.callback_metrics["loss"]), 1.0, report=strategy.report())


def _fail(run: L.Trainer, *_: Any) -> None:
    if run.global_step == 1:
        raise ZeroDivisionError("by the test")


def jobs(device: Device) -> list[tuple[dict[str, Any], Callable[[], JobResult]]]:
    """Finished, refused (k' > k) and failed ones in turn, each with a configuration of its own."""
    windows = [(1 + number % 4, 1 + number % 3, number % 5 == 3) for number in range(NUM_JOBS)]
    return [
        ({"superpipe": {"k": k, "k_prime": k_prime}, "number": number}, partial(job, device, k, k_prime, fails))
        for number, (k, k_prime, fails) in enumerate(windows)
    ]


def num_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    alive = {each.untyped_storage().data_ptr(): each.nbytes for each in gc.get_objects() if type(each) is Tensor}
    alive |= {each.data_ptr(): each.nbytes for each in gc.get_objects() if type(each) is nn.Parameter}
    return sum(alive.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_memory_is_back_at_its_start_after_every_job_of_a_sweep(device: Device, tmp_path: Path) -> None:
    from tests.emu import is_loaded, used_bytes

    def measure() -> tuple[int, int, int]:
        return resident_bytes(), num_tensor_bytes(), used_bytes() if is_loaded() else 0

    record_job(tmp_path, {"warm": "up"}, partial(job, device, 2, 1, False), is_sweep=True)
    resident, tensors, held = measure()
    statuses = []
    for config, work in jobs(device):
        statuses.append(record_job(tmp_path, config, work, is_sweep=True).status)
        now = measure()
        assert now[1:] == (tensors, held), f"after job {len(statuses)}, which {statuses[-1].value}"
        assert now[0] - resident < STATE_BYTES / 2, f"after job {len(statuses)}, which {statuses[-1].value}"
    assert set(statuses) == set(Status)


def test_a_module_left_over_would_show() -> None:
    before = num_tensor_bytes()
    module = Wide()
    assert num_tensor_bytes() - before == sum(parameter.nbytes for parameter in module.parameters())
