"""Every optimizer and scheduler of torch, parameter groups, clipping, and optimisation by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from tests.lightning.stories import Bench, Story, assert_same, devices
from tests.parity.probe import WIDTH, Device, ManualProbe, ProbeModule

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
        groups = [{"params": list(self.blocks.parameters())}, {"params": list(self.head.parameters()), "lr": 0.1}]
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


class ClosureCounter(ProbeModule):
    """Overrides `optimizer_step`: skips updates, warms the rate up, looks at the closure's loss."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            self.record("closure", optimizer_closure())
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + batch_idx)


class OwnClipping(ProbeModule):
    """Clips by its own rule, with the norm of every unit."""

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        for block in self.blocks:
            self.record("norm", nn.utils.clip_grad_norm_(block.parameters(), 0.02))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class SeveralByHand(ManualProbe):
    """Two optimizers with schedulers of their own, toggled, every other batch, with accumulation and clipping."""

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.blocks[:2].parameters(), lr=0.05, momentum=0.9, foreach=False)
        second = torch.optim.Adam([*self.blocks[1:].parameters(), *self.head.parameters()], lr=0.01, foreach=False)
        return [first, second], [lr_scheduler.ExponentialLR(first, 0.5), lr_scheduler.StepLR(second, 1)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, scheduler in zip(cast(Any, self.optimizers()), cast(Any, self.lr_schedulers()), strict=True):
            with optimizer.toggle_model(sync_grad=batch_idx % 2 == 1):
                loss = self.loss(batch)
                self.manual_backward(loss / 2)
                self.record_loss(loss)
                if batch_idx % 2 == 1:
                    self.clip_gradients(optimizer, 0.05, "norm")
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()


class WritesBeforeBackward(ManualProbe):
    """User code between forward and backward, inside the step, writes weights through `.data`."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        for parameter in self.parameters():
            parameter.data.mul_(0.9)
        self.manual_backward(loss)
        self.optimizer().step()
        self.optimizer().zero_grad()
        self.record_loss(loss)


class Thaws(ProbeModule):
    """Freezes everything but the head, thaws one unit per batch, freezes the head at last."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for index, block in enumerate(self.blocks):
            block.requires_grad_(index >= 4 - batch_idx)
        self.embed.requires_grad_(batch_idx == 3)
        self.head.requires_grad_(batch_idx < 2)


class Lookahead(ProbeModule):
    """The user's own optimizer around another writes weights after the inner step, through `.data`."""

    def configure_optimizers(self) -> Any:
        return SlowWeights(self.parameters())


class SlowWeights(torch.optim.SGD):
    """SGD whose weights follow slowly."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05, foreach=False)
        self.slow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for slow, parameter in zip(self.slow, parameters, strict=True):
            slow.to(parameter.device)
            slow.data = slow.data.to(parameter.device).lerp(parameter.data, 0.5)
            parameter.data.copy_(slow)
        return loss


class SharpnessAware(ProbeModule):
    """The closure runs again at a perturbed point, inside the optimizer's own step."""

    def configure_optimizers(self) -> Any:
        return Perturbing(self.parameters())


class Perturbing(torch.optim.SGD):
    """SGD with the gradient at a point uphill (SAM)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05, foreach=False)

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        moves = [0.05 * parameter.grad for parameter in parameters]
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.data.add_(move)
        closure()
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.data.sub_(move)
        super().step()
        return loss


MODULES: list[type[ProbeModule]] = [
    ClosureCounter,
    OwnClipping,
    SeveralByHand,
    WritesBeforeBackward,
    Thaws,
    Lookahead,
    SharpnessAware,
]


def trained(kind: type[ProbeModule]) -> Story:
    def story(bench: Bench) -> ProbeModule:
        module = kind()
        bench.trainer(max_epochs=2).fit(module)
        return module

    story.__name__ = kind.__name__
    return story


@pytest.mark.parametrize(("story", "device"), devices(map(trained, MODULES)))
def test_users_own_ways_to_optimise_equal_the_ordinary_run(story: Story, device: Device) -> None:
    assert_same(story, device)


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
