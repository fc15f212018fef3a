"""The update stage: when each unit is updated.

A unit may be updated at any time between "its gradient is final" and "its next prefetch". So the step of a separable
optimizer is split by unit, and the parts run in a thread of their own: as soon as a unit's gradients are home
(``in_backward``), or after the whole step was asked for, in the order in which the next forward needs the units
(``after_backward``). Copies of a unit's weights wait for its own part only, and so does everybody else who looks
(:mod:`lightning_superpipe.engine.pending`). Both are exact; other optimizers run as a whole, when they are asked to.
"""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.engine.arrivals import complete_all
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.host_lane import HostEvent, HostLane, Past
from lightning_superpipe.engine.lanes import Event, now
from lightning_superpipe.engine.pending import Pending, may_be_held, settle_before_forks, unfenced
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import SuperpipeError, SuperpipeWarning
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.optimizer.bench import Bench
from lightning_superpipe.optimizer.device import DeviceUpdates
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.parts import Announced, Part, by_unit
from lightning_superpipe.optimizer.promise import require_promise
from lightning_superpipe.optimizer.separable import (
    Member,
    is_scaled,
    is_separable,
    keeps_state,
    members,
    narrowed,
    options,
    parameters_of,
    put_in_order,
    run_for,
    trained,
)
from lightning_superpipe.optimizer.stored import StoredUpdates

__all__ = ["UpdateStage"]


class UpdateStage:
    """Splits the steps of optimizers by the units of one engine.

    Args:
        max_delay_ms: each part starts up to this much later, at random: a missing fence then shows as wrong numbers.
        seed: of those delays.
        masters: runs the parts where parameters have master weights; None where none have.
        in_thread: False: all parts run at once, when the step is asked for.
        device: updates some units on the device; None if all are updated on the host.
        stored: runs the parts of units that lie in files; None where none do.

    Attributes:
        in_thread: parts run in a thread of their own.
        num_parts: parts of steps that ran there.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_delay_ms: float = 0.0,
        seed: int = 0,
        masters: Masters | None = None,
        in_thread: bool = True,
        device: DeviceUpdates | None = None,
        stored: StoredUpdates | None = None,
    ) -> None:
        self._engine, self._stored = engine, stored
        self._masters, self.in_thread, self.device = masters, in_thread, device
        self._part = partial(Part, narrowed if masters is None else masters.narrowed)
        self._lane, self._scales = HostLane("superpipe-update"), HostLane("superpipe-scale")
        self._max_delay_ms, self._rng = max_delay_ms, random.Random(seed)
        self._hooks: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
        self._set_aside: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()
        self._announced: Announced | None = None
        self._has_announced = False
        self._once: set[int] = set()
        self._whole: set[str] = set()
        self.num_parts = 0
        settle_before_forks()

    @property
    def kind(self) -> str:
        """When units are updated, as the option ``update`` names it."""
        if not self.in_thread:
            return "at_once"
        return "in_backward" if self._has_announced else "after_backward"

    # -- whose steps

    def attend(self, optimizers: Iterable[Optimizer]) -> None:
        """Split the steps of these optimizers from now on; name those that cannot be, once.

        Raises:
            UnsupportedError: part of them was to run on the device, or on masters, but they cannot be split.
        """
        optimizers = list(optimizers)
        if self.device is not None:
            self.device.attend(optimizers)
        for optimizer in optimizers:
            own_hooks = self._masters.attend(optimizer) if self._masters and optimizer not in self._hooks else []
            if not is_separable(optimizer):
                self._note_whole(type(optimizer).__name__)
            elif optimizer not in self._hooks:
                self._engine.catalog.split.add(optimizer)
                self._hooks[optimizer] = [
                    optimizer.register_step_post_hook(self._after_step),
                    optimizer.register_step_pre_hook(self._before_step),
                    optimizer.register_state_dict_pre_hook(self._settle),
                    optimizer.register_load_state_dict_pre_hook(self._settle),
                    *own_hooks,
                ]
                self._engine.gradients.arrivals.expect(parameters_of(optimizer) if self.in_thread else ())
                if self._stored is not None:
                    self._hooks[optimizer].append(optimizer.register_load_state_dict_post_hook(self._adopt))
                    self._adopt(optimizer)

    def _adopt(self, optimizer: Optimizer) -> None:
        """States were made or loaded: move them into files, where they belong there."""
        assert self._stored is not None, "asked for only if states may be stored"
        self._stored.adopt(optimizer, self._units_of(optimizer))

    def _note_whole(self, name: str) -> None:
        if self.in_thread and name not in self._whole:
            self._whole.add(name)
            warnings.warn(
                f"{name} is not known to update each parameter by itself: its step runs as a whole.",
                SuperpipeWarning,
                stacklevel=4,
            )

    def _settle(self, optimizer: Optimizer, *_: Any) -> None:
        """Wait until nothing of an optimizer is under way."""
        for unit in self._units_of(optimizer):
            unit.settle()

    def _units_of(self, optimizer: Optimizer) -> list[Unit]:
        return self._engine.catalog.written_by(optimizer) or []

    # -- a step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the optimizer hand its step over once its closure has run; hooks of the user's are over by then."""
        kwargs = dict(kwargs)
        closure = args[1] if len(args) > 1 else kwargs.pop("closure", None)

        def run_closure() -> Any:
            loss = closure() if closure is not None else None
            with torch.no_grad():
                self._take_over(optimizer)
            return loss

        return (optimizer, run_closure), kwargs

    def _take_over(self, optimizer: Optimizer) -> None:
        """Start the parts of a step, and leave nothing to the optimizer itself."""
        require_promise(self._announced, optimizer, self._engine.units, self.withdraw)
        updated = self._end_announced(optimizer)
        for unit in self._units_of(optimizer):
            if unit.index not in updated:
                unit.settle()
        if self._masters is not None:
            self._masters.refuse_scaled(optimizer, members(optimizer))
        if self.device is not None:
            self.device.refuse_scaled(optimizer)
        everything, groups = members(optimizer), options(optimizer)
        self._engine.gradients.arrivals.end_step()
        if is_scaled(optimizer):
            complete_all(member.parameter.grad for member in everything)
            return
        of_units = by_unit(self._engine.catalog, everything)
        started = {id(member.parameter) for part in updated.values() for member in part.members}
        waiting, had_states = list[Unit](), list(optimizer.state)
        for rank, unit in enumerate(self._engine.units_by_need()):
            if not (some := [each for each in of_units.get(unit.index, ()) if id(each.parameter) not in started]):
                continue
            unit.settle()  # of parameters that it has got since the step was announced
            part, bench = self._prepare(unit, optimizer, groups, some)
            may_start = self._may_start(part)
            if may_start or bench is not None:
                self._start(unit, part, bench, after=Past(), rank=rank)
                if part.is_unscaled:
                    self._scales.submit(part.scale, after=Past())  # ahead of its update
                started.update(id(member.parameter) for member in some)
                waiting += [] if may_start else [unit]
        self._run_rest(optimizer, groups, [member for member in everything if id(member.parameter) not in started])
        for unit in waiting:
            unit.settle()
        if waiting:
            put_in_order(optimizer, had_states)
        self._set_aside[optimizer] = optimizer.param_groups
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._hooks[optimizer][0].id, last=False)
        optimizer.param_groups = []  # given back by the first hook behind the step

    def _prepare(
        self, unit: Unit, optimizer: Optimizer, groups: list[dict[str, Any]], some: Sequence[Member]
    ) -> tuple[Part, Bench | None]:
        """Return a unit's part of a step, and where it works if the unit lies in files."""
        if self._stored is not None:
            return self._stored.part(unit, optimizer, groups, some)
        return self._part(optimizer, groups, some), None

    def _run_rest(self, optimizer: Optimizer, groups: list[dict[str, Any]], rest: Sequence[Member]) -> None:
        """Run a step at once for what is in no part, in the optimizer's own order: that of states in checkpoints."""
        complete_all(member.parameter.grad for member in rest)
        run = run_for if self._masters is None else self._masters.run_for
        if self._stored is None:
            run(optimizer, groups, rest)
            return
        ledger = self._stored.ledger
        try:
            with ledger.lock:  # a part that fails undoes this as well
                ledger.tell()
                ledger.remember(optimizer, rest)
                run(optimizer, groups, rest)
        finally:
            self._stored.finish()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if (groups := self._set_aside.pop(optimizer, None)) is not None:
            optimizer.param_groups = groups

    def _may_start(self, part: Part) -> bool:
        """Whether a part can run in the thread, with everybody who looks at its tensors waiting for it."""
        optimizer, masters = part.optimizer, self._masters
        if not self.in_thread or not all(keeps_state(optimizer, member) for member in part.members):
            return False
        if masters is not None and not all(masters.has_master(optimizer, each.parameter) for each in part.members):
            return False
        return may_be_held([*part.tensors(), *(gradient for gradient in part.gradients() if gradient is not None)])

    def _start(self, unit: Unit, part: Part, bench: Bench | None, *, after: Event, rank: int) -> None:
        """Run a part in the thread, after an event that completes its gradients; ``rank``: place in order of need."""
        self.num_parts += 1
        delay = self._rng.random() * self._max_delay_ms / 1e3
        if bench is not None and self._stored is not None:
            unit.pending = self._stored.start(part, bench, partial(self._run, unit.index, delay), after, rank)
            return
        place = None if self.device is None else self.device.place_for(unit, part)
        done = HostEvent() if place is None else place.ending
        pending = unit.pending = Pending(part.tensors(), done, unit.note_settled)
        if isinstance(after, Past):
            part.take_gradients(pending)
        is_lent = self._engine.gradients.homes.lent_until(unit.index, done)
        update = partial(self._run, unit.index, delay, part, pending, is_lent=is_lent, is_on_host=place is None)
        if self.device is None or place is None:
            self._lane.submit(update, after=after, done=done)
        else:
            self.device.submit(place, update, pending, after=after)

    def _run(
        self, index: int, delay: float, part: Part, pending: Pending, *, is_lent: bool = False, is_on_host: bool = True
    ) -> None:
        lanes = self._engine.lanes
        time.sleep(delay)
        with unfenced(), torch.no_grad():
            start = now()
            part.run(pending)
            if is_lent:  # the gradients of the unit are used up
                pending.let_go(part.gradients())
                self._engine.gradients.homes.take_back(index, (member.parameter for member in part.members))
            if lanes.recorder is not None and is_on_host:
                lanes.recorder.span(Lane.HOST, "U", index, start, now())

    # -- in backward

    def _may_lend(self, index: int) -> bool:
        """Whether a unit will be updated as soon as its gradients are home, so that nobody needs them afterwards."""
        announced = self._announced
        is_awaited = announced is not None and index in announced.members and index not in announced.home
        if announced is None or not is_awaited or not self._comes_once(index):
            return False
        part = self._part(announced.optimizer, announced.groups, announced.members[index])
        return all(each.parameter.grad is None for each in part.members) and self._may_start(part)

    @contextlib.contextmanager
    def announced(self, optimizer: Optimizer, *, lends: bool = False) -> Iterator[None]:
        """Scope of a step whose closure runs the backward pass that :meth:`announce` speaks of."""
        self.announce(optimizer, lends=lends)
        try:
            yield
        except BaseException:
            if names := self.withdraw():
                warnings.warn(
                    f"the step was interrupted after {len(names)} of {len(self._engine.units)} units had been updated "
                    f"({names[0]} first): weights are not those of a finished step. Go on from the last checkpoint, or "
                    "use update='after_backward'.",
                    SuperpipeWarning,
                    stacklevel=4,
                )
            raise
        self.withdraw()

    def announce(self, optimizer: Optimizer, *, lends: bool = False) -> None:
        """Promise that the next backward pass is the last before a step of this optimizer, and that nobody looks at
        gradients in between: each unit may be updated as soon as its gradients are home.

        Args:
            lends: nobody looks at them afterwards either, so that their memory is only lent.
        """
        if optimizer not in self._hooks or not self.in_thread:
            return
        self._has_announced = True
        expected = by_unit(self._engine.catalog, trained(optimizer))
        ranks = {unit.index: rank for rank, unit in enumerate(self._engine.units_by_need())}
        self._announced = Announced(optimizer, expected, ranks, lends)
        self._engine.gradients.on_home = self._note_home
        self._engine.gradients.may_lend = self._may_lend if lends and self._stored is None else None
        if self._stored is not None:
            self._stored.expect(self._announced.members)

    def withdraw(self) -> list[str]:
        """No step follows any more; return the names of units that have been updated all the same."""
        updated = self._end_announced()
        for index in updated:
            self._engine.units[index].settle()
        if self._stored is not None and self._stored.abandon():
            return []
        return [self._engine.units[index].name for index in sorted(updated)]

    def suspend(self) -> list[str]:
        """Start no parts before the step that is announced; return the names of units updated already."""
        self._engine.gradients.on_home = self._engine.gradients.may_lend = None
        if self._announced is None:
            return []
        self._announced.home.clear()
        return [self._engine.units[index].name for index in sorted(self._announced.updated)]

    def _end_announced(self, optimizer: Optimizer | None = None) -> dict[int, Part]:
        """The backward pass is over, and with it the gradients are complete; return what has been updated."""
        announced, self._announced = self._announced, None
        self._engine.gradients.on_home = self._engine.gradients.may_lend = None
        if announced is not None and announced.home:  # none came home where it was suspended
            self._once = {index for index, home in announced.home.items() if max(home.values()) == 1}
        if announced is None or optimizer not in (None, announced.optimizer):
            return {}
        for index, part in announced.updated.items():
            if (pending := self._engine.units[index].pending) is not None and optimizer is not None:
                part.take_gradients(pending)
        return announced.updated

    def _note_home(self, index: int, parameters: Iterable[nn.Parameter], landed: Event) -> None:
        """Gradients of a unit are on their way home and complete once ``landed`` has passed."""
        announced = self._announced
        if announced is None or index not in announced.members:
            return
        unit, some = self._engine.units[index], announced.members[index]
        if index in announced.updated:
            raise SuperpipeError(
                f"unit {unit.name!r} got gradients twice before one step, but was updated after the first: use "
                "update='after_backward'."
            )
        home = announced.home.setdefault(index, Counter())
        home.update(id(parameter) for parameter in parameters)
        if not all(id(member.parameter) in home for member in some) or not self._comes_once(index):
            return
        part, bench = self._prepare(unit, announced.optimizer, announced.groups, some)
        if self._may_start(part):
            announced.updated[index] = part
            self._start(unit, part, bench, after=landed, rank=announced.ranks[index])

    def _comes_once(self, index: int) -> bool:
        """Whether a unit's gradients come once in this backward pass.

        Reentrant checkpointing brings those of a unit that is used several times one by one.
        """
        return index in self._once and self._engine.follower.num_forwards(index) == 1

    def close(self) -> None:
        """Finish what is under way, and leave the optimizers as they were."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()
        self._engine.gradients.on_home = self._engine.gradients.may_lend = None
        try:
            for unit in self._engine.units:
                unit.settle()
        finally:
            self._engine.gradients.arrivals.forget()
            for each in (self._scales, self._lane, self.device, self._stored):
                if each is not None:
                    each.close()
