"""Fences of updates: whoever looks at a tensor that is being updated sees the finished update."""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe.engine.host_lane import HostEvent
from lightning_superpipe.engine.pending import Pending, may_be_held, settle_before_forks, unfenced
from tests.optimizer.late_updates import LateLane

BEFORE, AFTER = 1.0, 3.0


class Update:
    """A parameter that is being set to AFTER, its gradient, and how often its end was told."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.full((3,), BEFORE))
        self.parameter.grad = torch.full((3,), BEFORE)
        self.lane, self.done, self.num_settled = LateLane(), HostEvent(), 0
        self.pending = Pending([self.parameter, self.parameter.grad], self.done, self._settled)
        self.lane.submit(self._run, after=_passed(), done=self.done)

    def _settled(self, pending: Pending) -> None:
        assert pending is self.pending
        self.num_settled += 1

    def _run(self) -> None:
        with unfenced(), torch.no_grad():
            self.parameter.fill_(AFTER)


def _passed() -> HostEvent:
    event = HostEvent()
    event.set()
    return event


def saved(parameter: nn.Parameter) -> Tensor:
    file = io.BytesIO()
    torch.save({"weight": parameter}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["weight"]


class Holder(nn.Module):
    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.weight = parameter


READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "operation": lambda p: p + 0,
    "data": lambda p: p.data,
    "detach": lambda p: p.detach(),
    "numpy": lambda p: torch.from_numpy(np.asarray(p.detach())),
    "tolist": lambda p: torch.tensor(p.tolist()),
    "index": lambda p: p[0].expand(3),
    "iterate": lambda p: torch.stack(list(p)),
    "copy": lambda p: torch.zeros(3).copy_(p),
    "stack": lambda p: torch.stack([p])[0],
    "foreach": lambda p: torch._foreach_add([p], 0.0)[0],
    "dlpack": lambda p: torch.from_dlpack(p.detach()),
    "storage": lambda p: torch.frombuffer(bytearray(p.untyped_storage()), dtype=torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "save": saved,
    "state dict": lambda p: Holder(p).state_dict()["weight"],
    "module attribute": lambda p: Holder(p).weight * 1,
    "out": lambda p: torch.add(p, 0.0, out=torch.empty(3)) if not p.requires_grad else torch.add(p.detach(), 0.0),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "text": lambda p: torch.tensor([AFTER] * 3) if "3., 3., 3." in repr(p) else torch.zeros(3),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_kind_of_reading_sees_the_finished_update(read: Callable[[nn.Parameter], Any]) -> None:
    update = Update()
    seen = read(update.parameter)
    assert torch.equal(seen.detach(), torch.full((3,), AFTER))
    assert type(update.parameter) is nn.Parameter and update.num_settled == 1
    assert type(seen) in (Tensor, nn.Parameter)


def overwrite(parameter: nn.Parameter) -> None:
    parameter.data = torch.full((3,), 7.0)


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda p: p.data.fill_(7.0),
    "initialiser": lambda p: nn.init.constant_(p, 7.0),
    "data": overwrite,
    "foreach": lambda p: torch._foreach_copy_([p.data], [torch.full((3,), 7.0)]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_user_writes_comes_after_the_update(write: Callable[[nn.Parameter], Any]) -> None:
    update = Update()
    write(update.parameter)
    update.pending.settle()
    assert update.parameter.eq(7.0).all()


@pytest.mark.parametrize("write", [Tensor.zero_, lambda g: g.mul_(0), lambda g: g.copy_(torch.zeros(3))])
def test_a_gradient_is_written_only_after_the_update_has_used_it(write: Callable[[Tensor], Any]) -> None:
    update = Update()
    gradient = update.parameter.grad
    assert gradient is not None
    write(gradient)
    assert update.lane.num_run == 1 and type(gradient) is Tensor


LOOKS: dict[str, Callable[[nn.Parameter], Any]] = {
    "shape": lambda p: p.shape,
    "size": lambda p: p.size(0),
    "dtype": lambda p: p.dtype,
    "device": lambda p: p.device,
    "requires_grad": lambda p: p.requires_grad,
    "gradient": lambda p: p.grad is not None,
    "numel": lambda p: p.numel(),
    "is a parameter": lambda p: isinstance(p, nn.Parameter),
    "hash": hash,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_a_shape_waits_for_nothing(look: Callable[[nn.Parameter], Any]) -> None:
    update = Update()
    assert look(update.parameter) == look(nn.Parameter(torch.ones(3))) or look in (LOOKS["gradient"], hash)
    assert update.lane.num_run == 0


def test_dropping_a_gradient_waits_for_nothing() -> None:
    update = Update()
    torch.optim.SGD([update.parameter]).zero_grad()
    assert update.parameter.grad is None and update.lane.num_run == 0


def test_a_tensor_of_a_fenced_type_is_an_ordinary_one_at_its_first_use() -> None:
    update = Update()
    kind: Any = type(update.parameter)
    other = kind(torch.ones(3))
    assert other.sum() == 3 and type(other) is nn.Parameter


def test_an_error_of_the_update_reaches_whoever_looks() -> None:
    update = Update()
    update._run = lambda: 1 / 0  # type: ignore[method-assign, assignment]
    update.lane._late.clear()
    update.lane.submit(update._run, after=_passed(), done=update.done)
    with pytest.raises(ZeroDivisionError):
        update.parameter.sum()
    assert type(update.parameter) is nn.Parameter


@pytest.mark.parametrize("share", [lambda p: p.detach(), lambda p: p.view(-1), lambda p: p.data[1:]])
def test_memory_that_others_share_cannot_be_fenced(share: Callable[[nn.Parameter], Tensor]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    alias = share(parameter)
    assert not may_be_held([parameter])
    del alias
    assert may_be_held([parameter])


def test_a_fork_waits_for_updates() -> None:
    settle_before_forks()
    update = Update()
    reads, writes = os.pipe()
    if not (child := os.fork()):
        os.write(writes, f"{float(update.parameter.sum())}".encode())
        os._exit(0)
    deadline = time.monotonic() + 30
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "the child waits for a thread that it does not have"
        time.sleep(0.01)
    assert float(os.read(reads, 100)) == 3 * AFTER
