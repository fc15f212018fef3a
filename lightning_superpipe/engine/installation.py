"""Installation: host bytes go into the store, and modules get their streamed classes; both can be undone and redone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_superpipe.engine.backend import storage_address
from lightning_superpipe.engine.calls import OuterOwner, RootOwner, RootScope, UnitOwner
from lightning_superpipe.engine.layout import home_in
from lightning_superpipe.engine.slots import storage_key
from lightning_superpipe.engine.swap import Owner, owner_of, swap_in, swap_out
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.tiers import Tier

if TYPE_CHECKING:
    from lightning_superpipe.engine.engine import Engine

__all__ = ["Installation"]


class Installation:
    """What an engine changes in a model.

    Args:
        tier: whose part for weights holds the host bytes of units.
        in_memory: units that stay in host memory in any case.
        root_scope: the root itself is called (not only its children), so its class is swapped as well; opens the scope
            of a step around each call.
    """

    def __init__(
        self, engine: Engine, root: nn.Module, tier: Tier, in_memory: Container[int], *, root_scope: RootScope | None
    ) -> None:
        self._engine, self._root, self._root_scope = engine, root, root_scope
        self._tier, self._in_memory = tier, in_memory
        weights = tier.part("weights")
        homes = [home_in(weights, unit.parameters) for unit in engine.units if unit.index not in in_memory]
        sizes = [(home.num_bytes, home.changes) for home in homes if home.num_bytes is not None]
        weights.reserve(
            (size for size, changes in sizes if changes), unchanging=(size for size, changes in sizes if not changes)
        )
        try:
            for unit in engine.units:
                self._install(unit)
        except BaseException:  # the host has no room: those that were installed are ordinary modules again
            for unit in engine.units:
                for module in unit.members.values():
                    swap_out(module)
            raise
        engine.residency.note_installed()
        self._outer = self._install_outer() if engine.anchors.have_copies else []
        if root_scope is not None and owner_of(root) is None:
            self._outer.append(root)
            swap_in(root, RootOwner(engine, root, None, root_scope))
        self._optimizer_hooks = _hook_optimizers(engine)

    def _install(self, unit: Unit) -> None:
        unit.reserve(self._tier.part("kept" if unit.index in self._in_memory else "weights"))
        self.adopt([unit])
        self._engine.gradients.add_group(unit.parameters)
        self._engine.catalog.add(unit)
        owner = UnitOwner(self._engine, unit)
        for module in unit.members.values():
            self._swap_in(module, owner)

    def _swap_in(self, module: nn.Module, owner: Owner) -> None:
        if module is self._root and self._root_scope is not None:
            owner = RootOwner(self._engine, module, owner, self._root_scope)
        swap_in(module, owner)

    def _install_outer(self) -> list[nn.Module]:
        inside = {id(module) for unit in self._engine.units for module in unit.module.modules()}
        outer = [
            module
            for module in self._root.modules()
            if id(module) not in inside
            and (self._root_scope is not None or module is not self._root)
            and not isinstance(module, torch.jit.ScriptModule)
            and not hasattr(module, "_orig_mod")
            and not hasattr(module, "add_state")  # metrics move their state themselves
        ]
        for module in outer:
            self._swap_in(module, OuterOwner(self._engine, module))
        return outer

    def adopt(self, units: Sequence[Unit]) -> None:
        """Bring host bytes into the store, where they are not there yet."""
        straying = [unit for unit in units if unit.homeless()]
        owners = None
        if straying and not self._engine.is_separate:
            tensors = [*self._root.parameters(), *self._root.buffers()]
            owners = Counter(storage_key(tensor) for tensor in tensors if storage_address(tensor) is not None)
        for unit in straying:
            unit.settle()
            unit.adopt(owners)

    def rescan(self, unit: Unit) -> None:
        """Read a unit's modules afresh: the user changed them, or some of its parameters became anchors."""
        engine = self._engine
        unit.settle()
        if unit.slot is not None:
            engine.residency.evict(unit)
        for module in unit.members.values():
            swap_out(module)
        engine.residency.forget(unit)
        engine.catalog.remove(unit)
        unit.scan()
        engine.note_dtypes()
        self._install(unit)
        engine.residency.note_installed()
        if unit.num_bytes > engine.slots.slot_bytes:
            for other in engine.units:
                if other.slot is not None:
                    engine.residency.evict(other)
            engine.residency.grow_slots(unit.num_bytes)

    def remove(self) -> None:
        """Give every module its own class back; host parameters keep their memory."""
        for hook in self._optimizer_hooks:
            hook.remove()
        for unit in self._engine.units:
            for module in unit.members.values():
                swap_out(module)
        for module in self._outer:
            swap_out(module)
        self._outer.clear()


def _stepped(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters that an optimizer had gradients for."""
    given = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {id(parameter) for parameter in given if parameter.grad is not None}


def _hook_optimizers(engine: Engine) -> list[Any]:
    """Any optimizer's step may write host parameters: nothing reads them meanwhile, and what was loaded is stale."""
    engine_ref = weakref.ref(engine)
    counted: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def before(optimizer: Optimizer, *_: Any) -> None:
        counted.discard(optimizer)
        if (engine := engine_ref()) is not None:
            engine.fence_host_reads()

    def after(optimizer: Optimizer, *_: Any) -> None:
        if (engine := engine_ref()) is not None:
            written = engine.catalog.written_by(optimizer)
            # It has written to the weights itself; a step that calls that of its base class comes here twice.
            is_whole = optimizer not in engine.catalog.split and optimizer not in counted
            counted.add(optimizer)
            stepped = _stepped(optimizer) if is_whole else set()
            for unit in engine.units if written is None else written:
                unit.epoch += 1
                if is_whole:
                    unit.note_written(index for index, each in enumerate(unit.parameters) if id(each) in stepped)
            engine.anchors.epoch += 1

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
