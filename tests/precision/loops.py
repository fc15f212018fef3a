"""The ordinary loops that training in two dtypes must equal, bit for bit, and the streamed one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.plain import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.observe.report import Report
from tests.precision.modules import Case

__all__ = ["OPTIMIZERS", "Outcome", "assert_same", "mastered", "streamed", "wired"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
SEED = 3

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=False),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


class Outcome(NamedTuple):
    """What a training leaves behind."""

    losses: list[float]
    state: dict[str, Tensor]
    optimizer: dict[str, Any]
    report: Report | None = None


class Plan(NamedTuple):
    """How a loop treats its batches.

    Attributes:
        accumulate: batches for each step.
        clip: largest norm of all gradients; None leaves them.
    """

    optimizer: str = "fused"
    accumulate: int = 1
    clip: float | None = None


PLAIN = Plan()


def _is_trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _finish_step(optimizer: Optimizer, parameters: list[nn.Parameter], index: int, plan: Plan) -> bool:
    """Clip and step where a step is due."""
    if (index + 1) % plan.accumulate:
        return False
    if plan.clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
    optimizer.step()
    return True


def wired(case: Case, dtype: torch.dtype, *, device: str = "cpu", plan: Plan = PLAIN) -> Outcome:
    """Train with a copy in another dtype, made anew from the float32 masters before every forward."""
    masters = case.module()
    work = copy.deepcopy(masters).to(device, dtype)
    for child in work.modules():  # what is made in float32 inside the model, and handed to its layers
        child.register_forward_pre_hook(_cast_inputs(dtype), with_kwargs=True)
    optimizer, losses = OPTIMIZERS[plan.optimizer](_is_trained(masters)), []
    pairs = list(zip(_is_trained(work), _is_trained(masters), strict=True))
    torch.manual_seed(SEED)
    optimizer.zero_grad()
    for index, x in enumerate(case.inputs()):
        with torch.no_grad():
            for mine, master in pairs:
                mine.copy_(master)
        loss = case.loss(work, x.to(device))
        (loss / plan.accumulate).backward()  # type: ignore[no-untyped-call]
        for mine, master in pairs:
            if mine.grad is not None:
                gradient, mine.grad = mine.grad.to("cpu").float(), None
                master.grad = gradient if master.grad is None else master.grad + gradient
        losses.append(loss.item())
        if _finish_step(optimizer, [master for _, master in pairs], index, plan):
            optimizer.zero_grad()
    buffers = dict(work.named_buffers())
    state = {
        name: buffers[name].to("cpu") if name in buffers else value for name, value in masters.state_dict().items()
    }
    return Outcome(losses, {name: value.clone() for name, value in state.items()}, optimizer.state_dict())


def _cast_inputs(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    return hook


def mastered(case: Case, *, device: str = "cpu", plan: Plan = PLAIN, resume: Outcome | None = None) -> Outcome:
    """Train a module in bfloat16: the optimizer works on a float32 copy, which is rounded into the parameters."""
    module = case.module().bfloat16()
    parameters = _is_trained(module)
    copies = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    work = copy.deepcopy(module).to(device)
    optimizer, losses = OPTIMIZERS[plan.optimizer](copies), []
    torch.manual_seed(SEED)
    for index, x in enumerate(case.inputs()):
        loss = case.loss(work, x.to(device, torch.bfloat16) if x.is_floating_point() else x.to(device))
        (loss / plan.accumulate).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if (index + 1) % plan.accumulate:
            continue
        _bring_home(work, parameters)
        if plan.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
        for parameter, master in zip(parameters, copies, strict=True):
            master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for mine, parameter, master in zip(_is_trained(work), parameters, copies, strict=True):
                parameter.copy_(master)
                mine.copy_(parameter)
                mine.grad = None
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name, buffer in work.named_buffers():
        if name in state:
            state[name] = buffer.to("cpu")
    return Outcome(losses, state, optimizer.state_dict())


def _bring_home(work: nn.Module, parameters: list[nn.Parameter]) -> None:
    for mine, parameter in zip(_is_trained(work), parameters, strict=True):
        parameter.grad = None if mine.grad is None else mine.grad.to("cpu")


def streamed(
    case: Case, *, module: nn.Module | None = None, device: str = "cpu", plan: Plan = PLAIN, **options: Any
) -> Outcome:
    """Train as the user does: the module as it is, one argument more."""
    module = module or case.module()
    parameters = _is_trained(module)
    is_half = any(parameter.dtype is torch.bfloat16 for parameter in parameters)
    optimizer, losses = OPTIMIZERS[plan.optimizer](parameters), []
    hostile = {"k": 2, "update": "after_backward", "adversary": Adversary(max_delay_ms=1.0)}
    torch.manual_seed(SEED)
    with attach(module, optimizer, device=device, **{**hostile, **options}) as pipe:
        optimizer.zero_grad()
        for index, x in enumerate(case.inputs()):
            loss = case.loss(
                module, x.to(device, torch.bfloat16) if x.is_floating_point() and is_half else x.to(device)
            )
            (loss / plan.accumulate).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            if _finish_step(optimizer, parameters, index, plan):
                optimizer.zero_grad()
        report = pipe.report()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return Outcome(losses, state, optimizer.state_dict(), report)


def assert_same(candidate: Outcome, reference: Outcome) -> None:
    """Raise AssertionError unless losses, weights and the optimizer's states are equal, bit for bit."""
    assert candidate.losses == reference.losses
    assert candidate.state.keys() == reference.state.keys()
    unequal = [
        name for name, value in reference.state.items() if not torch.equal(candidate.state[name].to(value.dtype), value)
    ]
    assert unequal == []
    for key, entries in reference.optimizer["state"].items():
        own = candidate.optimizer["state"][key]
        for name, value in entries.items():
            if isinstance(value, Tensor):
                assert own[name].dtype is value.dtype, name
                assert torch.equal(own[name], value), f"{name} of parameter {key}"
