"""Autograd used directly: higher derivatives, functional transforms, hooks, graphs kept alive."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from tests.parity.probe import WIDTH, ManualProbe, ProbeModule, probe


@probe()
class GradientPenalty(ProbeModule):
    """Double backward through all units: the first backward builds a graph over the weights."""

    def loss(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        value = super().loss(x)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return value + gradient.pow(2).sum()


@probe()
class GradientsOfParameters(ProbeModule):
    """`autograd.grad` is asked for host parameters, which are not in the graph."""

    def loss(self, x: Tensor) -> Tensor:
        value = super().loss(x)
        if self.training:
            grads = torch.autograd.grad(value, list(self.block(0).parameters()), retain_graph=True)
            self.record("grads", torch.cat([grad.flatten() for grad in grads]))
        return value


@probe()
class HessianVectorProduct(ProbeModule):
    """A second derivative by a host parameter."""

    def loss(self, x: Tensor) -> Tensor:
        value = super().loss(x)
        (gradient,) = torch.autograd.grad(value, [self.head.weight], create_graph=True)
        return value + gradient.pow(2).sum()


@probe()
class BackwardInputs(ManualProbe):
    """`backward(inputs=...)` names host parameters and must leave all other gradients alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizer()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward(inputs=list(self.block(1).parameters()))
        self.record("number of gradients", sum(p.grad is not None for p in self.parameters()))
        optimizer.step()
        self.record_loss(loss)


@probe()
class InnerStep(ProbeModule):
    """One unit is called with weights that are functions of its own gradient, as in meta-learning."""

    def loss(self, x: Tensor) -> Tensor:
        names, values = zip(*self.block(1).named_parameters(), strict=True)
        inner = cast(Tensor, self.block(1)(x)).pow(2).mean()
        grads = torch.autograd.grad(inner, values, create_graph=True)
        fast = {name: value - 0.1 * grad for name, value, grad in zip(names, values, grads, strict=True)}
        return super().loss(x) + cast(Tensor, functional_call(self.block(1), fast, (x,))).pow(2).mean()


@probe()
class FunctionalCall(ProbeModule):
    """`functional_call` replaces a unit's parameters while it runs: they must not be bound over."""

    def loss(self, x: Tensor) -> Tensor:
        block = self.block(1)
        scaled = {name: parameter * 1.01 for name, parameter in block.named_parameters()}
        return cast(Tensor, functional_call(block, scaled, (self(x).repeat(1, WIDTH // 2),))).pow(2).mean()


@probe()
class Vmap(ProbeModule):
    """A unit runs under `vmap`."""

    def loss(self, x: Tensor) -> Tensor:
        rows: Tensor = vmap(lambda row: self.head(row), randomness="different")(x)
        return super().loss(x) + rows.pow(2).mean()


@probe()
class JacobianInStep(ProbeModule):
    """`jacrev` far from any unit forbids saved-tensor hooks in the whole step."""

    def loss(self, x: Tensor) -> Tensor:
        jacobian: Tensor = jacrev(lambda y: torch.tanh(y).sum())(x)
        return super().loss(x) + jacobian.sum()


@probe()
class JacobianThroughUnit(ProbeModule):
    """`jacrev` through a unit: neither hooks nor new twins are possible inside the transform."""

    def loss(self, x: Tensor) -> Tensor:
        jacobian: Tensor = jacrev(lambda y: self.head(y).sum())(x)
        return super().loss(x) + jacobian.pow(2).sum()


@probe()
class ParameterHooks(ProbeModule):
    """Gradient hooks sit on host parameters, while the gradient is made for their twins."""

    def build(self) -> None:
        def double(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(2)

        self.block(1).up.weight.register_hook(lambda grad: grad * 0.5)
        self.head.weight.register_post_accumulate_grad_hook(double)


@probe()
class ModuleHooks(ProbeModule):
    """Forward and backward hooks on units and inside them, some of which change what flows."""

    def build(self) -> None:
        def smaller(module: nn.Module, grads: Any, outs: Any) -> tuple[Tensor]:
            return (grads[0] * 0.9,)

        def smaller_before(module: nn.Module, outs: Any) -> tuple[Tensor]:
            return (outs[0] * 0.8,)

        self.block(1).register_full_backward_hook(smaller)
        self.block(2).up.register_full_backward_pre_hook(smaller_before)
        self.block(0).up.register_forward_hook(lambda module, args, output: output * 1.1)
        self.block(3).register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


@probe()
class AttributesOnParameters(ProbeModule):
    """A backward hook hangs results on `module.weight`; the loop reads them from its own parameter."""

    def build(self) -> None:
        def hang(module: nn.Module, grads: Any, outs: Any) -> None:
            cast(Any, module.weight).row_norm = outs[0].norm()

        for index in range(len(self.blocks)):
            self.block(index).up.register_full_backward_hook(hang)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = [cast(Any, self.block(index).up.weight).row_norm for index in range(len(self.blocks))]
        self.record("row norms", torch.stack(norms))


@probe()
class ActivationHooks(ProbeModule):
    """Gradients kept and hooked at the seams between units."""

    def trunk(self, x: Tensor) -> Tensor:
        self.seams = []
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            if x.requires_grad:
                x.retain_grad()
                x.register_hook(lambda grad: grad * 0.9)
                self.seams.append(x)
        return x

    def on_after_backward(self) -> None:
        self.record("seams", torch.stack([cast(Tensor, seam.grad) for seam in self.seams]))
        self.seams = []


@probe()
class TwoBackwardsSameGraph(ManualProbe):
    """A retained graph runs backward twice: every token is unpacked twice, gradients add up."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizer().zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss * 2)
        self.optimizer().step()
        self.record_loss(loss)


@probe()
class TwoLossesSharedTrunk(ManualProbe):
    """Two losses over one trunk run backward one after the other."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        hidden = self.trunk(batch)
        first, second = self.head(hidden).pow(2).mean(), hidden.mean()
        self.optimizer().zero_grad()
        self.manual_backward(first, retain_graph=True)
        self.manual_backward(second)
        self.optimizer().step()
        self.record_loss(first)


@probe()
class StaleGraph(ManualProbe):
    """Backward through a graph older than the last update raises in the ordinary run, so it must raise here."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.optimizer().zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.optimizer().step()
        raised = False
        try:
            self.manual_backward(loss)
        except RuntimeError as error:
            raised = "modified by an inplace operation" in str(error)
        self.record("raised", raised)
        self.optimizer().zero_grad()
        self.record_loss(loss)


@probe()
class StaleGraphFused(ManualProbe):
    """A fused update does not raise `_version`: the old graph runs through, over the *new* weights, as in plain."""

    fused = True

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.optimizer().zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.optimizer().step()
        raised = False
        try:
            self.manual_backward(loss)
        except RuntimeError:
            raised = True
        self.record("raised", raised)
        self.optimizer().step()
        self.record_loss(loss)


class Breaks(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ValueError("raised by the probe in backward")


@probe()
class ExceptionInBackward(ManualProbe):
    """Backward raises half way and the user catches it: nothing stays bound, the next step is exact."""

    broken = False

    def trunk(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.broken and index == 1:
                x = cast(Tensor, Breaks.apply(x))
        return x

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizer()
        self.broken = True
        try:
            self.manual_backward(self.loss(batch))
        except ValueError:
            self.record("caught", 1)
        self.broken = False
        self.record("number of gradients", sum(p.grad is not None for p in self.parameters()))
        self.record("own parameters", set(self.parameters()) == set(optimizer.param_groups[0]["params"]))
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.record_loss(loss)
