"""Every optimizer and scheduler of torch, parameter groups, clipping, and optimisation by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from tests.lightning.stories import Bench, Story, assert_same
from tests.parity.probe import WIDTH, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = sorted(
    (kind for kind in vars(torch.optim).values() if inspect.isclass(kind) and issubclass(kind, Optimizer)),
    key=lambda kind: kind.__name__,
)
NEED_SPARSE = {"SparseAdam"}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
}


def record_state(module: ProbeModule, optimizer: Optimizer) -> None:
    """Record an optimizer's state by parameter name, and the rates of its groups."""
    for name, parameter in module.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                assert value.device == parameter.device or value.dim() == 0
                module.record(f"{key} of {name}", value)
    for group in optimizer.param_groups:
        module.record("rate", float(group["lr"]))


class Optimised(ProbeModule):
    """Trains with an optimizer of torch and its default options."""

    def __init__(self, kind: type[Optimizer]) -> None:
        self.kind = kind
        super().__init__()

    def build(self) -> None:
        if self.kind.__name__ in NEED_SPARSE:
            self.table = nn.Embedding(8, WIDTH, sparse=True)

    def trunk(self, x: Tensor) -> Tensor:
        if self.kind.__name__ in NEED_SPARSE:
            x = x + self.table((x[:, 0] > 0).long())
        return super().trunk(x)

    def configure_optimizers(self) -> Any:
        kind: Any = self.kind
        if self.kind.__name__ in NEED_SPARSE:
            rest = [p for name, p in self.named_parameters() if not name.startswith("table")]
            self.automatic_optimization = False
            return kind([self.table.weight], lr=0.01), torch.optim.SGD(rest, lr=0.01)
        if self.kind.__name__ == "Muon":
            return kind([p for p in self.parameters() if p.ndim == 2])
        return kind(self.parameters(), **({"lr": 0.01} if self.kind.__name__ in ("SGD", "LBFGS") else {}))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            assert loss is not None
            for optimizer in cast(list[Any], self.optimizers()):
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in cast(list[Any], self.optimizers()):
                optimizer.step()
        return loss


def trained_by(kind: type[Optimizer]) -> Story:
    def story(bench: Bench) -> Optimised:
        module = Optimised(kind)
        run = bench.trainer(max_epochs=1, limit_val_batches=0)
        run.fit(module)
        for optimizer in run.optimizers:
            record_state(module, optimizer)
        return module

    story.__name__ = kind.__name__
    return story


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Optimizer], ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_equals_the_ordinary_run(kind: type[Optimizer]) -> None:
    assert_same(trained_by(kind), "cpu")


def test_every_scheduler_of_torch_is_tested() -> None:
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert known == SCHEDULES.keys()


class Scheduled(ProbeModule):
    """Two parameter groups, a schedule stepped every batch."""

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule
        super().__init__()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.log("loss", loss)
        for group in self.trainer.optimizers[0].param_groups:
            self.record("rate", float(group["lr"]))
        return loss

    def configure_optimizers(self) -> Any:
        groups: Any = [{"params": list(self.blocks.parameters())}, {"params": list(self.head.parameters()), "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False)
        scheduler = SCHEDULES[self.schedule](optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss", "frequency": 1},
        }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_scheduler_of_torch_equals_the_ordinary_run(schedule: str) -> None:
    def story(bench: Bench) -> Scheduled:
        module = Scheduled(schedule)
        bench.trainer(max_epochs=1, limit_val_batches=0).fit(module)
        return module

    assert_same(story, "cpu")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_clipping_and_accumulation_equal_the_ordinary_run(algorithm: str, accumulate: int, fused: bool) -> None:
    class Clipped(ProbeModule):
        def configure_optimizers(self) -> Any:
            return self.adamw(fused=True) if fused else self.adamw()

    def story(bench: Bench) -> Clipped:
        module = Clipped()
        run = bench.trainer(
            gradient_clip_val=0.01, gradient_clip_algorithm=algorithm, accumulate_grad_batches=accumulate
        )
        run.fit(module)
        record_state(module, run.optimizers[0])
        return module

    assert_same(story, "cpu")
