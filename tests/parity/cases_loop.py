"""The training loop: accumulation, clipping, closures, optimisation by hand, precision, schedules, logging."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from tests.parity.probe import ManualProbe, ProbeModule, probe


@probe(max_epochs=3)
class Plain(ProbeModule):
    """Nothing special: the loop itself."""


@probe(accumulate_grad_batches=2, gradient_clip_val=0.05)
class AccumulatedClipped(ProbeModule):
    """Micro-batches add up in host gradients; the norm is one number over all tensors, in torch's order."""


@probe(gradient_clip_val=0.002, gradient_clip_algorithm="value")
class ClippedByValue(ProbeModule):
    """Values are clipped in place on host gradients."""


@probe(accumulate_grad_batches=3)
class UnevenAccumulation(ProbeModule):
    """Four batches in groups of three: the last group of an epoch is smaller."""


@probe()
class Lbfgs(ProbeModule):
    """The optimizer calls the closure several times and moves the weights between the calls."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)


@probe()
class TwoOptimizers(ManualProbe):
    """User code inside `training_step` toggles, reads gradients, clips, steps, and runs a second forward."""

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.blocks[:2].parameters(), lr=0.01, momentum=0.9, foreach=False)
        rest = [*self.blocks[2:].parameters(), *self.head.parameters()]
        return first, torch.optim.AdamW(rest, lr=0.01, foreach=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = cast(Any, self.optimizers())
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        self.record("gradient", cast(Tensor, self.block(0).up.weight.grad))
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        self.untoggle_optimizer(first)

        def closure() -> Tensor:
            second.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.record_loss(loss)
            return loss

        second.step(closure=closure)


@probe()
class RawBackward(ManualProbe):
    """`loss.backward()` behind Lightning's back: gradients must be home when it returns."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        loss.backward()
        self.record("gradient", cast(Tensor, self.block(0).up.weight.grad))
        self.optimizer().step()
        self.zero_grad()
        self.record_loss(loss)


class TwiceFused(ManualProbe):
    """Base: fused updates in the middle of a step, which no version counter shows."""

    fused = True

    def update(self, batch: Tensor) -> None:
        optimizer = self.optimizer()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.record_loss(loss)


@probe()
class TwoFusedSteps(TwiceFused):
    """Two fused updates inside one `training_step`: the units of the turn are still on the device, and stale."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.update(batch)
        self.update(batch)


@probe()
class TwoFusedStepsTied(TwoFusedSteps):
    """The same with a tied weight, whose device copy never leaves."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(self.embed.in_features, self.embed.out_features)
        self.head.weight = self.embed.weight


@probe()
class ForwardStepForward(TwiceFused):
    """A forward without gradients leaves units on the device, then a fused update, then a forward again."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizer()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            self.record("before", self(batch))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            self.record("after", self(batch))


@probe()
class ZerosInsteadOfNone(ManualProbe):
    """Gradients are zeroed in place: the tensors that the user holds stay the gradients."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizer()
        held = [parameter.grad for parameter in self.parameters()]
        optimizer.zero_grad(set_to_none=False)
        loss = self.loss(batch)
        self.manual_backward(loss)
        same = [parameter.grad is grad for parameter, grad in zip(self.parameters(), held, strict=True)]
        self.record("same tensors", same.count(True))
        optimizer.step()
        self.record_loss(loss)


@probe()
class GroupsByIdentity(ProbeModule):
    """Parameter groups are made by looking parameters up through modules."""

    def configure_optimizers(self) -> Any:
        decayed = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        rest = [p for p in self.parameters() if not any(p is q for q in decayed)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, foreach=False)


@probe()
class WarmOptimizer(ProbeModule):
    """The optimizer comes with state from an earlier life, which must not be moved to the device."""

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw()
        for parameter in self.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer


def _bf16(device: str) -> list[MixedPrecision]:
    return [MixedPrecision("bf16-mixed", device)]


@probe(plugins=_bf16)
class Bf16Mixed(ProbeModule):
    """Autocast keeps a cast copy of every weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        assert y.dtype == torch.bfloat16
        return y


@probe(precision="bf16-true")
class Bf16True(ProbeModule):
    """All weights are converted before the fit starts."""


@probe(precision="64-true")
class Double(ProbeModule):
    """Slots hold elements of eight bytes."""


def _scaler(device: str) -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=2.0**10))]


@probe(plugins=_scaler, gradient_clip_val=0.05)
class LossScaling(ProbeModule):
    """The scale lives on the device, gradients are unscaled, clipped and checked for infinities on the host."""

    def loss(self, x: Tensor) -> Tensor:
        loss = super().loss(x)
        return loss * float("inf") if self.training and self.trainer.global_step == 2 and not self.losses[2:] else loss


@probe(detect_anomaly=True, max_epochs=1, once=True)
class AnomalyMode(ProbeModule):
    """Anomaly mode checks every gradient and keeps a stack per node."""


@probe()
class ScheduledEveryStep(ProbeModule):
    """A scheduler writes rate and betas into the optimizer's groups after every step."""

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@probe(max_epochs=3)
class ScheduledByMetric(ProbeModule):
    """A scheduler waits for a logged validation loss."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@probe()
class Metrics(ProbeModule):
    """Logged values come from the device (losses, metric objects) and from the host (norms, weights, floats)."""

    def build(self) -> None:
        self.mean = MeanMetric()
        self.accuracy = MetricCollection({"accuracy": BinaryAccuracy()})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        prediction = self(batch)
        self.mean.update(prediction)
        self.accuracy.update(prediction.sigmoid(), batch[:, :2] > 0)
        loss = cast(Tensor, prediction.pow(2).mean())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_epoch=True)
        self.log_dict(self.accuracy, on_epoch=True)
        self.log("float", 0.5)
        self.record_loss(loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
        self.log("grad_norm", torch.stack(grads).norm())
        self.log("weight_norm", self.block(0).up.weight.norm())
