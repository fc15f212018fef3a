"""Master weights: parameters of 2 bytes are updated in float32, and get the rounded values.

The user's optimizer stays. Its state holds, beside its own entries, the master of each such parameter, all in float32,
so that checkpoints hold them. A part of a step runs on stand-ins: the master, and the gradient cast into memory that is
used again for part after part. What somebody has written to a parameter since the last step goes into its master first.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.engine.casting import cast_into, take_changes
from lightning_superpipe.engine.wire import HALVES
from lightning_superpipe.errors import SuperpipeWarning, UnsupportedError
from lightning_superpipe.optimizer.separable import Member, is_scaled, is_separable, narrowed
from lightning_superpipe.optimizer.stand_ins import StandIn, held, step_on
from lightning_superpipe.partition.anchors import is_dense

__all__ = ["MASTER", "Masters", "step_on_masters", "wants_master"]

MASTER = "master"
"""Key of the master in the state of a parameter."""

# Elements updated in one call, if no tensor is larger: the kernels' own cost is then too small to see.
_BATCH = 1 << 21


def wants_master(parameter: Tensor) -> bool:
    """Whether a parameter cannot hold what small updates add up to."""
    return parameter.dtype in HALVES


class Masters:
    """Runs parts of steps of separable optimizers, with masters where parameters have 2 bytes."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._scratch_bytes: dict[int, int] = {}
        self._loading: dict[int, dict[str, Any]] = {}
        self._has_said = False

    # -- whose steps

    def attend(self, optimizer: Optimizer) -> list[Any]:
        """Keep states in float32 when the optimizer loads them; return the hooks.

        Raises:
            UnsupportedError: the optimizer cannot be split into parts.
        """
        if not any(wants_master(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            return []
        if not is_separable(optimizer):
            raise UnsupportedError(
                f"master_weights='float32' cannot be used with {type(optimizer).__name__}: it is not known to update "
                "each parameter by itself, so its step cannot run on masters. Use an optimizer of torch.optim (AdamW, "
                "SGD, Adafactor, Muon, ...), or leave master_weights out."
            )
        return [
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    def refuse_scaled(self, optimizer: Optimizer, some: Iterable[Member]) -> None:
        """Raise for a step whose gradients a scaler has left to the kernel.

        Raises:
            UnsupportedError: of parameters that have masters.
        """
        if is_scaled(optimizer) and any(wants_master(member.parameter) for member in some):
            raise UnsupportedError(
                "master_weights='float32' cannot be used with a gradient scaler that hands its factors over to the "
                "optimizer: call scaler.unscale_(optimizer) before scaler.step(optimizer), or train in bfloat16, which "
                "needs no scaler."
            )

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading[id(optimizer)] = state_dict

    def _after_loading(self, optimizer: Optimizer) -> None:
        """Give states back the digits that loading has cut off: torch casts them to the parameters' dtype."""
        loaded = self._loading.pop(id(optimizer), None)
        if loaded is None:
            return
        saved_ids = (key for group in loaded["param_groups"] for key in group["params"])
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for key, parameter in zip(saved_ids, parameters, strict=True):
            if wants_master(parameter):
                state = optimizer.state.get(parameter, {})
                wider = {
                    name: value.to("cpu", copy=True)
                    for name, value in loaded["state"].get(key, {}).items()
                    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not state[name].dtype
                }
                state.update(wider)

    # -- steps

    def has_master(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Whether a step needs to make nothing first."""
        return not wants_master(parameter) or _is_ready(optimizer.state.get(parameter, {}))

    def run_for(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]) -> None:
        """Run a step for some parameters, at once; masters are made where there are none."""
        for member in some:
            if not self.has_master(optimizer, member.parameter):
                self._make(optimizer, member.parameter)
        self.narrowed(optimizer, groups, some)()

    def narrowed(
        self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]
    ) -> Callable[[], None]:
        """Return the step for some parameters, see :func:`separable.narrowed`; their masters are there."""
        plain = narrowed(optimizer, groups, [member for member in some if not wants_master(member.parameter)])
        mastered = [held(optimizer, member) for member in some if wants_master(member.parameter)]

        def step() -> None:
            plain()
            with torch.no_grad():
                for batch in _batches(mastered):
                    self._step(optimizer, groups, batch)

        return step

    def step_on(
        self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], stand_ins: Sequence[StandIn]
    ) -> list[dict[str, Any]]:
        """Run a step on stand-ins, see :func:`stand_ins.step_on`; masters are made where there are none."""
        states = [dict(each.state) for each in stand_ins]
        plain = [each for each in stand_ins if not wants_master(each.parameter)]
        made_plain = iter(step_on(optimizer, groups, plain))
        mastered: list[StandIn] = []
        for each, state in zip(stand_ins, states, strict=True):
            if wants_master(each.parameter):
                self._complete(optimizer, each.parameter, state)
                mastered.append(StandIn(each.group, each.parameter, each.gradient, state))
            else:
                state.update(next(made_plain))
        for batch in _batches(mastered):
            self._step(optimizer, groups, batch)
        return [
            {name: value for name, value in state.items() if value is not each.state.get(name)}
            for each, state in zip(stand_ins, states, strict=True)
        ]

    def _step(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], batch: Sequence[StandIn]) -> None:
        scratch, start = self._scratch(sum(each.parameter.numel() for each in batch)), 0

        def memory(gradient: Tensor) -> Tensor:
            nonlocal start
            start += gradient.numel()
            return scratch[start - gradient.numel() : start].as_strided(gradient.size(), gradient.stride())

        for each, made in zip(batch, step_on_masters(optimizer, groups, batch, memory), strict=True):
            each.state.update(made)

    def _make(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        """Make a parameter's master of its value, and its states float32."""
        self._complete(optimizer, parameter, optimizer.state[parameter])

    def _complete(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        if _is_ready(state):
            return
        if not self._has_said and _has_run(state):
            self._has_said = True
            warnings.warn(
                f"{type(optimizer).__name__} has states without float32 masters: its masters are made from the "
                f"parameters, which hold {parameter.dtype}.",
                SuperpipeWarning,
                stacklevel=2,
            )
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in HALVES:
                state[name] = value.float()
        state[MASTER] = parameter.detach().float()

    # -- memory

    @property
    def scratch_bytes(self) -> int:
        """Host memory that gradients are cast into."""
        return sum(self._scratch_bytes.values())

    def _scratch(self, num_elements: int) -> Tensor:
        """Memory of the calling thread, used again by its next part."""
        scratch: Tensor | None = getattr(self._of_thread, "scratch", None)
        if scratch is None or scratch.numel() < num_elements:
            scratch = self._of_thread.scratch = torch.empty(num_elements, dtype=torch.float32)
            self._scratch_bytes[threading.get_ident()] = scratch.nbytes
        return scratch


def step_on_masters(
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    some: Sequence[StandIn],
    memory: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Run a step through masters; as :func:`step_on`, with the rounded values in the parameters.

    Args:
        some: parameters of 2 bytes, whose states hold their masters.
        memory: returns float32 memory shaped as a dense gradient, which is cast into it.
    """
    stand_ins: list[StandIn] = []
    for each in some:
        take_changes(each.state[MASTER], each.parameter)
        # Kernels take an empty state for a first step, so they must not see the master in it.
        own = {key: value for key, value in each.state.items() if key != MASTER}
        gradient = _cast_gradient(each.gradient, memory)
        stand_ins.append(StandIn(each.group, each.state[MASTER], gradient, own))
    made = step_on(optimizer, groups, stand_ins)
    for each in some:
        cast_into(each.parameter, each.state[MASTER])
    return made


def _batches(some: Sequence[StandIn]) -> Iterator[list[StandIn]]:
    """Parameters by calls of a size that is worth one."""
    batch: list[StandIn] = []
    num_elements = 0
    for each in some:
        if batch and num_elements + each.parameter.numel() > _BATCH:
            yield batch
            batch, num_elements = [], 0
        batch.append(each)
        num_elements += each.parameter.numel()
    if batch:
        yield batch


def _cast_gradient(gradient: Tensor, memory: Callable[[Tensor], Tensor]) -> Tensor:
    """A gradient in float32, in the memory given where it is dense."""
    if gradient.layout is not torch.strided:
        return gradient.float()
    cast = memory(gradient) if is_dense(gradient) else torch.empty_like(gradient, dtype=torch.float32)
    cast_into(cast, gradient)
    return cast


def _is_ready(state: dict[str, Any]) -> bool:
    return MASTER in state and all(value.dtype not in HALVES for value in state.values() if isinstance(value, Tensor))


def _has_run(state: dict[str, Any]) -> bool:
    """Whether states come from steps, and not from a constructor."""
    return bool(state) and float(state.get("step", 1)) > 0
