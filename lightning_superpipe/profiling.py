"""The unit profile of a run: its own first steps are measured, and nothing of them changes.

Bytes are counted in the steps that are counted anyway; times are taken in the steps behind them, because counting costs
time itself. No step waits for the device: spans are read when all of them are over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_superpipe.engine.activations import Policy
from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.engine.census import Census, Held
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.lanes import now
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.observe.kernels import with_kernels
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.meter import Boundary, Meter
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.observe.step_times import StepMark, UnitTimes, speeds_of, unit_times
from lightning_superpipe.observe.trace import Span
from lightning_superpipe.observe.unit_profile import TransientBytes, UnitProfile, transient_bytes
from lightning_superpipe.planning.budget import KeptBytes
from lightning_superpipe.planning.need import of_whole_batch
from lightning_superpipe.planning.workload import Setting, UnitWork, Workload

__all__ = ["Profiler"]


class _Update(NamedTuple):
    """A step of an optimizer: by its id, in which timed step, and whether it has made no states."""

    optimizer: int
    step: int
    is_regular: bool


class Profiler:
    """Measures steps of one engine: the session says which.

    Args:
        optimizers: returns those of the run.
        kept_bytes: returns what stays on the device beside slots, or would stay.
        with_store: returns a workload with what lies in files, see :func:`lightning_superpipe.host_memory.with_store`.
        pinned: copies are from and to page-locked memory.
    """

    def __init__(
        self,
        engine: Engine,
        meter: Meter,
        *,
        trains: bool,
        optimizers: Callable[[], Sequence[Optimizer]],
        kept_bytes: Callable[[], KeptBytes],
        with_store: Callable[[Workload], Workload],
        pinned: bool = True,
    ) -> None:
        self._engine, self._meter, self._trains, self._pinned = engine, meter, trains, pinned
        self._optimizers, self._kept_bytes, self._with_store = optimizers, kept_bytes, with_store
        self._hooks: list[Any] = []
        self._trail: list[Boundary] = []
        self._held: list[Held] = []
        self._peak = PeakBytes()
        self._given_bytes, self._batch_bytes = 0, list[int]()  # in this step; in all, first in the last one counted
        self._spans: list[Span] = []
        self._marks: list[StepMark] = []
        self._is_timing = self._is_followed = False
        self._begin_s = self._home_s = self._update_s = self._asked_s = 0.0
        self._step_s: list[float] = []
        self._updates: list[_Update] = []
        self._num_states = 0

    # -- which steps

    def begin_step(self, *, counts: bool, times: bool) -> None:
        """A step begins.

        Args:
            counts: its bytes are counted.
            times: it is one of those whose times are taken; the first that is not ends that.
        """
        if not times:
            self.end_timing()
        elif self._is_timing:
            self._close_mark()
        else:
            self._begin_timing()
        if times:
            self._begin_s, self._home_s, self._update_s, self._is_followed = now(), 0.0, 0.0, True
        if counts:
            self._begin_counting()
        self._engine.probes.on_boundary = self._note_boundary if counts or times else None
        self._engine.probes.given_bytes, self._given_bytes = 0 if counts or times else None, 0

    def note_home(self) -> None:
        """Gradients of the step are home; where nothing is trained, its forward has been issued."""
        self._home_s, self._given_bytes = now(), self._engine.probes.given_bytes or 0

    def _note_boundary(self, name: str, unit: int) -> None:
        if self._meter.trail is not None:
            self._meter.sample(name, unit)
        if name == "home":
            self.note_home()

    def note_disturbance(self) -> None:
        """Something else runs between two steps."""
        self._is_followed = False

    def begin_training(self) -> None:
        """What follows is training: forget the passes without it."""
        self.drop()
        self._trains, self._batch_bytes = True, []

    def drop(self) -> None:
        """Forget the steps that are being measured: one has failed."""
        self.end_timing()
        self._marks, self._step_s, self._begin_s, self._meter.trail = [], [], 0.0, None
        self._stop_listening()

    def close(self) -> None:
        """Measure no more."""
        self._is_timing = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stop_listening()

    def _stop_listening(self) -> None:
        probes, self._given_bytes = self._engine.probes, 0
        probes.on_boundary = probes.census = probes.given_bytes = None

    # -- bytes

    def _begin_counting(self) -> None:
        """Count bytes of the step that begins."""
        probes, meter = self._engine.probes, self._meter
        probes.census = Census(self._engine.slots, self._engine.staying(), meter.counts, meter.note_saved)
        meter.trail, meter.step_peak = [], PeakBytes()

    def end_step(self) -> None:
        """The step is over; without gradients, also if nothing was held."""
        probes, meter, place = self._engine.probes, self._meter, len(self._batch_bytes)
        if probes.census is not None and meter.trail is not None:
            self._held, self._trail = probes.census.held(len(self._engine.units)), meter.trail
            self._peak, place = meter.step_peak, 0
        if self._given_bytes:
            self._batch_bytes.insert(place, self._given_bytes)
        probes.census = meter.trail = probes.given_bytes = None
        self._given_bytes = 0

    # -- times

    def _begin_timing(self) -> None:
        self._engine.lanes.start_recording()
        self._is_timing, self._marks, self._step_s, self._is_followed = True, [], [], False
        self._updates = []
        own = {id(optimizer) for optimizer in self._optimizers()}

        def before(optimizer: Optimizer, *_: Any) -> None:
            if id(optimizer) in own:
                self._asked_s, self._num_states = now(), len(optimizer.state)

        def after(optimizer: Optimizer, *_: Any) -> None:
            if id(optimizer) in own:
                self._update_s += now() - max(self._asked_s, self._home_s)
                is_regular = len(optimizer.state) == self._num_states
                self._updates.append(_Update(id(optimizer), len(self._marks), is_regular))

        self._hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def _close_mark(self) -> None:
        if self._begin_s and self._home_s:
            self._marks.append(StepMark(self._begin_s, self._home_s, self._update_s, self._is_followed))
            end_s = now() if self._is_followed else self._home_s + self._update_s  # else something else ran behind it
            self._step_s.append(end_s - self._begin_s)
        self._begin_s = 0.0

    def end_timing(self) -> None:
        """Stop recording, if that goes on; the step behind the last one begins."""
        if self._is_timing:
            self._close_mark()
            self._spans = self._engine.lanes.stop_recording().spans()
            self._is_timing = False
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    # -- the profile

    @property
    def step_s(self) -> tuple[float, ...]:
        """Seconds of each step that was timed."""
        return tuple(self._step_s)

    @property
    def peak(self) -> PeakBytes:
        """Device bytes at the peak of the last step that was counted."""
        return self._peak

    @property
    def lacks_update(self) -> bool:
        """Whether no optimizer step lies behind one of the timed steps: gradients accumulate.

        One that makes the states does not count: it runs as a whole.
        """
        return bool(self._optimizers()) and not any(
            each.is_regular and each.step < len(self._marks) for each in self._updates
        )

    def _updates_per_step(self, *, regular_only: bool = False) -> float:
        """Steps of an optimizer for each step that was timed."""
        by_optimizer = Counter(each.optimizer for each in self._updates if each.is_regular or not regular_only)
        return min(1.0, max(by_optimizer.values(), default=0) / max(len(self._marks), 1))

    def profile(self, setting: Setting, *, emulated: bool, machine: MachineProfile | None = None) -> UnitProfile | None:
        """Return what was measured; None before a step was timed.

        Args:
            setting: under which the steps ran; its activation policies count in the order of registration.
            machine: what was measured of the machine before.
        """
        if not self._marks or not self._spans:
            return None
        # The host may be far ahead of a device that computes forwards only: they are taken together.
        times = unit_times(self._spans, self._marks if self._trains else [StepMark(self._marks[0].begin_s, math.inf)])
        if not times.order:
            return None
        num_passes = 1 if self._trains else max(1, round(times.num_passes / len(self._marks)))
        held = self._held or [Held()] * len(self._engine.units)
        in_parts = {unit for unit in times.order if self._is_in_parts(unit, setting)}
        whole = [held[unit].inputs if unit in in_parts else held[unit].activations for unit in times.order]
        in_force = [_held_under(setting.policy(unit), held[unit]) for unit in times.order]
        transients = transient_bytes(self._trail, times.order, in_force, whole)
        policies = setting.activations and tuple(setting.policy(unit) for unit in times.order)
        units = [self._work(unit, times, held[unit], transients, setting) for unit in times.order]
        if not times.update_s:
            units = _shared_update(units, times.whole_update_s)
        # Not by the work of units: a forward that is computed again in less time than it took may leave none of it.
        lowest = next((place for place, unit in enumerate(times.order) if times.backward_s.get(unit)), len(units) - 1)
        kept = self._kept_bytes()
        workload = Workload(
            units=tuple(units),
            anchor_bytes=kept.anchors,
            turn_s=times.turn_s,
            turn_bytes=max(0, transients.turn),
            between_s=times.between_s + (times.whole_update_s if times.update_s else 0.0),
            trains=self._trains,
            lowest=lowest if self._trains else 0,
            samples=min((count for unit in times.order if (count := self._rows(unit)) > 1), default=1),
            updates=self._updates_per_step() or 1.0,
            shares_memory=self._engine.lanes.shares_memory,
            update_bytes=kept.updates,
            kernel_bytes=kept.kernels,
            batch_bytes=tuple(self._batch_bytes),
        )
        if share := setting.update_on_device:
            is_host = not is_separate(self._engine.device)
            workload = with_kernels(workload, machine, shares_memory=is_host, share=share)
        return UnitProfile(
            self._with_store(workload),
            speeds_of(self._spans, None if machine is None else machine.speeds(pinned=self._pinned)),
            replace(setting, activations=policies),
            times.order,
            tuple(each / num_passes for each in self.step_s),
            self._peak,
            str(self._engine.device),
            emulated,
            num_passes,
        )

    def _rows(self, unit: int) -> int:
        """Samples in a unit's batch; 1 where there is none that could be split."""
        return self._engine.probes.given_rows.get(unit, 1)

    def _splits(self, unit: int) -> bool:
        return self._engine.activations.splits(unit) and self._rows(unit) > 1

    def _is_in_parts(self, unit: int, setting: Setting) -> bool:
        is_recomputed = setting.policy(unit) == Policy.RECOMPUTE.value
        return setting.micro_batches > 1 and is_recomputed and self._splits(unit)

    def _work(self, index: int, times: UnitTimes, held: Held, transients: TransientBytes, setting: Setting) -> UnitWork:
        unit, policy = self._engine.units[index], setting.policy(index)
        forward_s, backward_s = times.forward_s.get(index, 0.0), times.backward_s.get(index, 0.0)
        regular = self._updates_per_step(regular_only=True)  # only these were recorded by unit
        if policy == Policy.RECOMPUTE.value and backward_s:
            backward_s = max(0.0, backward_s - forward_s)
        work = UnitWork(
            name=unit.name,
            weight_bytes=unit.num_bytes,
            gradient_bytes=_gradient_bytes(unit) if self._trains else 0,
            state_bytes=_state_bytes(unit, self._optimizers()),
            forward_s=forward_s,
            backward_s=backward_s,
            update_s=times.update_s.get(index, 0.0) * self._updates_per_step() / (regular or 1.0),
            activation_bytes=held.activations,
            input_bytes=held.inputs,
            offload_bytes=held.travels,
            forward_bytes=transients.forward[index],
            backward_bytes=transients.backward[index],
            unfreed_backward_bytes=transients.unfreed[index],
            policies=self._engine.activations.possible(index),
            splits=self._splits(index),
        )
        return of_whole_batch(work, setting.micro_batches) if self._is_in_parts(index, setting) else work


def _held_under(policy: str, held: Held) -> int:
    if policy == Policy.RECOMPUTE.value:
        return held.inputs
    return held.activations - (held.travels if policy == Policy.OFFLOAD.value else 0)


def _gradient_bytes(unit: Unit) -> int:
    parameters = zip(unit.parameters, unit.dtypes, strict=True)
    return sum(host.numel() * dtype.itemsize for host, dtype in parameters if host.requires_grad)


def _state_bytes(unit: Unit, optimizers: Sequence[Optimizer]) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # sizes need not wait for updates under way
        states = [optimizer.state.get(host, {}) for optimizer in optimizers for host in unit.parameters]
        values = [value for state in states if isinstance(state, dict) for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _shared_update(units: Sequence[UnitWork], seconds: float) -> list[UnitWork]:
    """Give each unit its part of an update that ran as a whole."""
    total = sum(unit.gradient_bytes for unit in units)
    return [replace(unit, update_s=seconds * unit.gradient_bytes / max(total, 1)) for unit in units]
