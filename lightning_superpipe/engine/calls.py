"""What happens around a call of a swapped module: a unit loads, binds, runs and unbinds; other modules bind anchors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_superpipe.engine.backend import graph_task_id, hooks_are_allowed, is_tracing, raw_tensors
from lightning_superpipe.engine.swap import Owner, owner_of
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.engine.watch import pause
from lightning_superpipe.planning import Op

if TYPE_CHECKING:
    from lightning_superpipe.engine.engine import Engine

__all__ = ["OuterOwner", "RootOwner", "UnitOwner"]

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
RootScope = Callable[[str], AbstractContextManager[Callable[[Any], None] | None]]


class _EngineOwner:
    """What all kinds of owners share."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.device = engine.device

    def unwatched(self) -> AbstractContextManager[None]:
        """Scope in which reading host parameters is nobody's business: whoever takes a state dict wants the host's."""
        return pause(self._engine.watch)

    def generate(self, generate: Forward, args: Args, kwargs: Kwargs) -> Any:
        """Run the module's own ``generate``."""
        return generate(*args, **kwargs)

    def host_state(self, module: nn.Module) -> dict[str, Any]:
        """The module's parameters and buffers as they are on the host."""
        return self._engine.binding.host_state(module)


class UnitOwner(_EngineOwner):
    """Owns a unit's root and every module inside that has parameters, so that ``block.encode(x)`` works as well."""

    def __init__(self, engine: Engine, unit: Unit) -> None:
        super().__init__(engine)
        self._unit = unit

    def owns(self, module: nn.Module) -> bool:
        return self._unit.members.get(id(module)) is module

    def call(self, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        engine, unit = self._engine, self._unit
        if unit.num_active and (not torch.is_grad_enabled() or engine.saved.is_innermost()):
            return forward(*args, **kwargs)  # a module inside a unit that runs already
        if is_tracing():
            self._leave_device()
            return forward(*args, **kwargs)
        if not unit.num_active:
            args, kwargs = engine.wire.inputs(args), engine.wire.inputs(kwargs)
        if not hooks_are_allowed():
            return self._run_transformed(forward, args, kwargs)
        if engine.is_separate and not unit.num_active:
            args, kwargs = _aligned(args, engine.device), _aligned(kwargs, engine.device)
        with pause(engine.watch):  # the engine's own work, and the unit's, are nobody's reads outside
            return self._run(module, forward, args, kwargs)

    def _leave_device(self) -> None:
        if self._unit.slot is not None and not self._unit.num_active:
            self._engine.residency.evict(self._unit)

    def _run_transformed(self, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        """Run inside ``torch.func.grad`` and its kin: they forbid saved-tensor hooks, so the unit becomes an anchor."""
        engine, unit = self._engine, self._unit
        engine.catalog.promote_unit(unit, "torch.func")
        self._leave_device()
        sites = unit.registered() if engine.anchors.have_copies and not unit.num_active else []
        sites = [site for site in sites if engine.is_anchor(site.parameter)]
        for site in sites:
            site.put(engine.anchors.twin(site.parameter))
        try:
            return forward(*args, **kwargs)
        finally:
            for site in sites:
                site.put(site.parameter)

    def _run(self, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        engine, unit = self._engine, self._unit
        is_outermost = unit.num_active == 0
        op = Op.FORWARD if graph_task_id() == -1 else Op.BACKWARD
        engine.use(unit, op)
        is_recorded = is_outermost and op is Op.FORWARD and engine.lanes.recorder is not None
        start = engine.lanes.mark() if is_recorded else None

        def compute(*args: Any, **kwargs: Any) -> Any:
            with engine.saved.saving(), engine.casts.watch(unit, engine.slots):
                return forward(*args, **kwargs)

        engine.enter(unit)
        try:
            if is_outermost and op is Op.FORWARD:
                engine.probes.given(unit.index, (args, kwargs))
            if is_outermost and op is Op.FORWARD and torch.is_grad_enabled():
                output = engine.activations.run(unit, module, compute, args, kwargs)
            else:
                output = compute(*args, **kwargs)
            if is_outermost:
                output = _without_slot_views(engine, output)
            if start is not None:
                engine.lanes.compute_span(op.value, unit.index, start)
        finally:
            engine.leave(unit, op)
        if is_outermost and torch.is_grad_enabled():
            _prefetch_in_backward(engine, unit, output)
        return output


class OuterOwner(_EngineOwner):
    """Owns a module outside all units on a separate device: its anchors and buffers are bound while it runs."""

    def __init__(self, engine: Engine, module: nn.Module) -> None:
        super().__init__(engine)
        self._module = weakref.ref(module)

    def owns(self, module: nn.Module) -> bool:
        return self._module() is module

    def call(self, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        engine = self._engine
        if is_tracing():
            return forward(*args, **kwargs)
        parameters = {
            name: host for name, host in module._parameters.items() if host is not None and engine.is_anchor(host)
        }
        for name, host in parameters.items():
            module._parameters[name] = engine.anchors.twin(host)
        buffers = engine.anchors.bind_buffers([module])
        if any(True for _ in module.parameters()):  # a loss may have been given float32 on purpose
            args, kwargs = engine.wire.inputs(args), engine.wire.inputs(kwargs)
        if parameters:
            args, kwargs = _aligned(args, engine.device), _aligned(kwargs, engine.device)
        try:
            return forward(*args, **kwargs)
        finally:
            engine.anchors.unbind_buffers(buffers)
            for name, host in parameters.items():
                if engine.anchors.host_of(module._parameters.get(name)) is host:
                    module._parameters[name] = host


class RootOwner(_EngineOwner):
    """Owns the root of a model that a loop calls which we do not know: each of its calls is a step.

    Args:
        inner: the owner that the root has besides, if any.
        scope: opens the scope of a step of some kind, ``"call"`` or ``"generate"``; does nothing inside another. What
            it gives, if anything, is told the output of a call.
    """

    def __init__(self, engine: Engine, module: nn.Module, inner: Owner | None, scope: RootScope) -> None:
        super().__init__(engine)
        self._module = weakref.ref(module)
        self._inner, self._scope = inner, scope

    def owns(self, module: nn.Module) -> bool:
        return self._module() is module

    def call(self, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        is_recomputed = graph_task_id() != -1
        if is_tracing() or is_recomputed:
            return self._call_inner(module, forward, args, kwargs)
        with self._scope("call") as tell:
            if owner_of(module) is not self:  # streaming has ended
                return forward(*args, **kwargs)
            output = self._call_inner(module, forward, args, kwargs)
            if tell is not None:
                tell(output)
            return output

    def generate(self, generate: Forward, args: Args, kwargs: Kwargs) -> Any:
        """Run the module's own ``generate``: all its forward passes belong to one step."""
        with self._scope("generate"):
            return generate(*args, **kwargs)

    def _call_inner(self, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        return forward(*args, **kwargs) if self._inner is None else self._inner.call(module, forward, args, kwargs)


def _aligned(values: Any, device: torch.device) -> Any:
    """Move tensors that a unit gets from the host (masks, positions) to the device; never rebuild for nothing.

    Callees mutate the lists they are given, so a container without a stray tensor is passed on as it is.
    """

    def is_stray(leaf: Any) -> bool:
        return type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "cpu" and leaf.dim() > 0

    if not any(map(is_stray, tree_leaves(values))):
        return values
    return tree_map_only(Tensor, lambda tensor: tensor.to(device) if is_stray(tensor) else tensor, values)


def _without_slot_views(engine: Engine, output: Any) -> Any:
    """Clone outputs that are views of a slot: they would die with it. Values and gradients are the same."""

    def is_view(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and engine.slots.of(leaf) is not None

    if not any(map(is_view, tree_leaves(output))):
        return output
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if is_view(tensor) else tensor, output)


def _prefetch_in_backward(engine: Engine, unit: Unit, output: Any) -> None:
    """When backward reaches the unit's output, load and bind it: some nodes read weights that no token guards.

    (Custom functions that keep ``ctx.w``, a user's checkpoint inside the unit, embeddings.)
    """
    engine_ref, unit_ref = weakref.ref(engine), weakref.ref(unit)

    def reached(_: Any) -> None:
        engine, unit = engine_ref(), unit_ref()
        if engine is not None and unit is not None and engine.is_open:
            engine.use_in_backward(unit)

    with raw_tensors():
        nodes = {leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
    for node in nodes:
        node.register_prehook(reached)
