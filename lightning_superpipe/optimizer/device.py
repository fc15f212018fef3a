"""Updates on the device: the gradients and states of some units go there, and come back with new weights.

The host's thread is free for the other units meanwhile (Deep Optimizer States, Maurya et al. 2024). The units are those
that the next forward needs first. Where such a unit still lies in its slot with current weights, the slot is updated as
well, and the next forward loads nothing. Two sets of scratch memory take turns, each with a thread of its own: one
unit's tensors travel while those of the other are used. The step that runs is that of the user's optimizer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer

from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.host_lane import HostEvent, HostLane
from lightning_superpipe.engine.lanes import Copy, Event, Label
from lightning_superpipe.engine.pending import Pending
from lightning_superpipe.engine.shortage import OutOfDeviceMemory
from lightning_superpipe.engine.slots import Slot
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.optimizer.fused import left_open
from lightning_superpipe.optimizer.masters import step_on_masters, wants_master
from lightning_superpipe.optimizer.parts import Part
from lightning_superpipe.optimizer.scratch import NUM_SETS, Scratch, kernel_bytes_of, scratch_bytes_of
from lightning_superpipe.optimizer.separable import Member, is_scaled, is_separable
from lightning_superpipe.optimizer.stand_ins import StandIn, held, step_on
from lightning_superpipe.partition.anchors import is_dense
from lightning_superpipe.planning.workload import updated_on_device

__all__ = ["DeviceUpdates", "Ending", "refuse_whole_steps"]


class Ending(HostEvent):
    """The end of an update on the device: its weights are home. ``kernels`` has passed by then, at the latest."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = HostEvent()

    def set(self) -> None:
        if not self.kernels.query():
            self.kernels.error = self.error
            self.kernels.set()
        super().set()


class Place(NamedTuple):
    """Where one update on the device runs.

    Attributes:
        slot: the unit's own, to be updated as well; None where it holds no current weights.
        computed: what has been computed with the slot until now.
    """

    number: int
    unit: Unit
    slot: Slot | None
    computed: Event
    ending: Ending


class DeviceUpdates:
    """Updates a share of the units on the device.

    Args:
        share: of all units, 0.0 to 1.0.
        has_masters: parameters of 2 bytes have float32 masters in their states.
        poison: fill scratch memory with NaN bytes before each use.

    Attributes:
        num_parts: updates that ran here.
        scratch_bytes: device memory of one set, once optimizers are known.
    """

    def __init__(self, engine: Engine, share: float, *, has_masters: bool, poison: bool) -> None:
        self._engine, self.share = engine, share
        self._has_masters, self._poison = has_masters, poison
        self._lanes = [HostLane(f"superpipe-update-{number}") for number in range(NUM_SETS)]
        self._scratch: list[Scratch] = []
        self._chosen: frozenset[int] | None = None
        self._computing = threading.Lock()
        self.num_parts = 0
        self.scratch_bytes = 0

    def attend(self, optimizers: Sequence[Optimizer]) -> None:
        """Make sure that these optimizers can run on the device, and learn how much memory that takes.

        Raises:
            UnsupportedError: one of them cannot be split into parts.
        """
        refuse_whole_steps(optimizers, self.share)
        self.scratch_bytes = max(self._bytes_of(unit, optimizers) for unit in self._engine.units)

    def refuse_scaled(self, optimizer: Optimizer) -> None:
        """Raise for a step whose gradients a scaler has left to the kernel: they change as soon as the step returns.

        Raises:
            UnsupportedError: some units were to be updated here.
        """
        if self.share and is_scaled(optimizer):
            raise UnsupportedError(
                f"update_on_device={self.share:g} cannot be used with a gradient scaler that hands its factors over to "
                "the optimizer: call scaler.unscale_(optimizer) before scaler.step(optimizer), or train in bfloat16, "
                "which needs no scaler."
            )

    def _bytes_of(self, unit: Unit, optimizers: Iterable[Optimizer]) -> int:
        return scratch_bytes_of(unit.parameters, optimizers, with_masters=self._has_masters)

    # -- one part

    def place_for(self, unit: Unit, part: Part) -> Place | None:
        """Where to update a unit here; None if the host updates it.

        Raises:
            OutOfDeviceMemory: there is no room for the scratch.
        """
        if self._chosen is None:
            self._chosen = updated_on_device([unit.index for unit in self._engine.units_by_need()], self.share)
        fits = all(tensor.dim() and is_dense(tensor) for tensor in (member.parameter for member in part.members))
        if unit.index not in self._chosen or not fits or self._bytes_of(unit, [part.optimizer]) > self.scratch_bytes:
            return None
        self._allocate()
        number = self.num_parts % NUM_SETS
        self.num_parts += 1
        slot = unit.slot if self._engine.residency.may_update_in_slot(unit) else None
        place = Place(number, unit, slot, self._engine.lanes.compute_event(), Ending())
        for member in part.members:  # now: graphs of the next forward note versions before the weights are home
            torch.autograd.graph.increment_version(member.parameter)
        part.narrow = partial(self._narrowed, place)
        return place

    def submit(self, place: Place, job: Callable[[], None], pending: Pending, *, after: Event) -> None:
        """Run a part in the thread of its place."""
        if place.slot is not None:
            place.unit.update_in_slot(pending, place.ending.kernels)
        self._lanes[place.number].submit(job, after=after, done=place.ending)

    def _narrowed(
        self, place: Place, optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]
    ) -> Callable[[], None]:
        """Return the step for some parameters, as :func:`separable.narrowed` does."""
        own = [held(optimizer, member) for member in some]
        own = [each._replace(parameter=each.parameter.data) for each in own]  # with a version of its own
        position = {id(parameter): index for index, parameter in enumerate(place.unit.parameters)}
        indices = [position[id(member.parameter)] for member in some]
        return partial(self._update, place, optimizer, _as_here(optimizer, groups, self._engine.device), own, indices)

    def _update(
        self,
        place: Place,
        optimizer: Optimizer,
        groups: Sequence[dict[str, Any]],
        own: list[StandIn],
        indices: list[int],
    ) -> None:
        scratch = self._scratch[place.number]
        scratch.clear()
        here = [self._stand_in(scratch, optimizer, groups, each) for each in own]
        slot, unit, lanes = place.slot, place.unit, self._engine.lanes
        in_slot = [
            slot is not None and unit.dtypes[index] is each.parameter.dtype
            for index, each in zip(indices, own, strict=True)
        ]
        label = Label("U", unit.index, unit.name)
        weights = [Copy(there.parameter, each.parameter) for each, there in zip(own, here, strict=True)]
        others = [copy for each, there in zip(own, here, strict=True) for copy in _others(each, there)]
        gradients = [Copy(there.gradient, each.gradient) for each, there in zip(own, here, strict=True)]
        missing = [copy for copy, is_there in zip(weights, in_slot, strict=True) if not is_there]
        lanes.carry(Lane.H2D, [*missing, *gradients, *others], label=label)

        def compute() -> list[dict[str, Any]]:
            views = [] if slot is None else [unit.view(slot, index) for index in indices]
            for view, there, is_there in zip(views, here, in_slot, strict=False):
                if is_there:
                    there.parameter.copy_(view)
            made = self._step(scratch, optimizer, groups, here)
            for view, there in zip(views, here, strict=False):
                view.copy_(there.parameter)
            return made

        made: list[dict[str, Any]] = []
        place.computed.synchronize()
        with self._computing:
            lanes.run_beside(lambda: made.extend(compute()))
        place.ending.kernels.set()
        lanes.carry(Lane.D2H, [Copy(copy.source, copy.target) for copy in (*weights, *others)], label=label)
        for each, new in zip(own, made, strict=True):
            each.state.update({name: _home(value) for name, value in new.items()})

    def _step(
        self, scratch: Scratch, optimizer: Optimizer, groups: Sequence[dict[str, Any]], here: Sequence[StandIn]
    ) -> list[dict[str, Any]]:
        """Run the step; return what it has made, for each parameter."""
        has_master = [self._has_masters and wants_master(each.parameter) for each in here]
        plain = [each for each, has in zip(here, has_master, strict=True) if not has]
        mastered = [each for each, has in zip(here, has_master, strict=True) if has]
        made_plain = iter(step_on(optimizer, groups, plain) if plain else [])
        memory = partial(scratch.like, dtype=torch.float32)
        made_mastered = iter(step_on_masters(optimizer, groups, mastered, memory) if mastered else [])
        return [next(made_mastered if has else made_plain) for has in has_master]

    def _stand_in(
        self, scratch: Scratch, optimizer: Optimizer, groups: Sequence[dict[str, Any]], own: StandIn
    ) -> StandIn:
        takes_numbers = bool(groups[own.group].get("fused")) or type(optimizer) is ASGD
        state = {
            name: scratch.like(value) if isinstance(value, Tensor) and (value.dim() or takes_numbers) else value
            for name, value in own.state.items()
        }
        return StandIn(own.group, scratch.like(own.parameter), scratch.like(own.gradient), state)

    def _allocate(self) -> None:
        """Take the memory before the first part of a step starts: without it nothing of the step happens."""
        if self._scratch:
            return
        device, num_bytes = self._engine.device, self.scratch_bytes
        try:
            self._scratch = [Scratch(device, num_bytes, poison=self._poison) for _ in range(NUM_SETS)]
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"the device has no room to update units on it (update_on_device={self.share:g}): {error} That takes "
                f"{NUM_SETS} x {num_bytes} bytes. No unit was updated, and all gradients are there: take a smaller k "
                "or leave update_on_device out."
            ) from error

    def use_share(self, share: float) -> None:
        """Update so many units here from now on."""
        self.share, self._chosen = share, None

    @property
    def num_units(self) -> int:
        """Units that are updated here, of all; 0 before the first is."""
        return len(self._chosen or ())

    @property
    def need_bytes(self) -> int:
        """Device memory that updates take: the scratch, and what kernels that are not fused make beside it."""
        return self.kept_bytes + self.kernel_bytes

    @property
    def kept_bytes(self) -> int:
        """The scratch of all sets, which is held from the first update on."""
        return NUM_SETS * self.scratch_bytes

    @property
    def kernel_bytes(self) -> int:
        """What kernels that are not fused make beside it, at most."""
        return max(kernel_bytes_of(unit.parameters) for unit in self._engine.units)

    @property
    def held_bytes(self) -> int:
        """Device memory that is held now."""
        return len(self._scratch) * self.scratch_bytes

    def close(self) -> None:
        """Finish what is under way and give the memory back."""
        for lane in self._lanes:
            lane.close()
        self._scratch.clear()


def refuse_whole_steps(optimizers: Iterable[Optimizer], share: float) -> None:
    """Make sure that a share of the units can be updated apart from the others.

    Raises:
        UnsupportedError: an optimizer cannot be split into parts.
    """
    for optimizer in optimizers:
        if share and not is_separable(optimizer):
            raise UnsupportedError(
                f"update_on_device={share:g} cannot be used with {type(optimizer).__name__}: it is not known to update "
                "each parameter by itself, or has capturable or differentiable set, so that no part of its step can "
                "run elsewhere. Use an optimizer of torch.optim as it is (AdamW, SGD, Adafactor, Muon, ...), or leave "
                "update_on_device out."
            )


def _others(own: StandIn, there: StandIn) -> list[Copy]:
    """Copies of the states that stand elsewhere."""
    return [Copy(there.state[name], value) for name, value in own.state.items() if there.state[name] is not value]


def _home(value: Any) -> Any:
    return value.to("cpu") if isinstance(value, Tensor) else value


def _as_here(optimizer: Optimizer, groups: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The options of a step on the device: where we chose the fused kernels for the host, torch chooses for itself."""
    open_here = left_open(optimizer) if device.type in ("cuda", "xpu") else frozenset()
    return [{**group, "fused": None} if index in open_here else group for index, group in enumerate(groups)]
