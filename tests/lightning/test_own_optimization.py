"""Users' own ways to optimise: closures, clipping, several optimizers by hand, freezing, own optimizers."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from tests.lightning.stories import Bench, Story, assert_same, devices
from tests.parity.probe import Device, ManualProbe, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")


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
