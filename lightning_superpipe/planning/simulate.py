"""Simulation of training steps: what the engine does, on lanes whose speeds are known.

One thread issues everything (the loop's, that calls the module), and each lane works in the order in which it was
asked. So a step is played in one walk over its plan: compute has one clock, and each copy and each update gets its end
from what it waits for. What waits for what is the engine's (:mod:`lightning_superpipe.engine.engine`):

- what the plan moves after a forward is issued at its end; after a backward, when the next one begins, behind the
  gradients of the unit before and the activations that are fetched;
- a load waits for the update of its own unit, and so do all loads behind it;
- gradients may fill twice the largest unit's on the device, then backward waits for the oldest to be home;
- backward is over when all gradients are home; updates follow in the order of need, or follow each gradient
  (``in_backward``), or hold everything up (``at_once``);
- all that lies in files shares a disk (:mod:`lightning_superpipe.planning.disk_queue`); a few loads are read ahead;
- units that are updated on the device take gradients and states there and bring weights and states home, past what is
  queued; where one still lies in its slot, its weights do not travel there, and it is not loaded again.
"""

from __future__ import annotations

import math
from collections import deque

from lightning_superpipe.planning.actions import Action, Op, Plan
from lightning_superpipe.planning.device_updates import DeviceUpdate, DeviceUpdates
from lightning_superpipe.planning.disk_queue import DiskMove, DiskQueue, DiskUpdate, ReadAhead
from lightning_superpipe.planning.file_route import FileRoute
from lightning_superpipe.planning.link import Copying, Link
from lightning_superpipe.planning.need import (
    backward_peak_bytes,
    forward_peak_bytes,
    gradient_limit_bytes,
    host_use,
    num_slots,
    recompute_peak_bytes,
    saved_bytes,
    unfreed_backward_peak_bytes,
)
from lightning_superpipe.planning.offloads import MemoryRoute, Offloads, Route
from lightning_superpipe.planning.played import PlayedStep, are_repeated, mean_of
from lightning_superpipe.planning.prediction import LaneSeconds, PeakBytes, Prediction
from lightning_superpipe.planning.step_plan import step_plan
from lightning_superpipe.planning.workload import Setting, Speeds, Workload, updated_there

__all__ = ["simulate", "simulate_within"]

_MAX_STEPS = 8


def simulate(workload: Workload, speeds: Speeds, setting: Setting) -> Prediction:
    """Play steps until one is like the one before, and return it.

    Raises:
        PlanError: the setting is impossible (see :func:`lower_window`).

    Cost: about a millisecond for 24 units.

    >>> from lightning_superpipe.planning.workload import Curve, UnitWork
    >>> unit = UnitWork("h", weight_bytes=10, gradient_bytes=10, forward_s=1.0, backward_s=2.0)
    >>> link = Speeds(h2d=Curve.steady(10.0), d2h=Curve.steady(10.0))
    >>> step = simulate(Workload((unit,) * 4), link, Setting(k=2))
    >>> round(step.step_s, 6), step.num_loads, [round(stall, 6) for stall in step.stalls_s], round(step.end_stall_s, 6)
    (14.0, 6.0, [1.0, 0.0, 0.0, 0.0], 1.0)
    >>> step.busiest, round(step.bound_s, 6)
    ('compute', 12.0)
    """
    found = simulate_within(workload, speeds, setting, math.inf)
    assert found is not None, "no step is longer than that"
    return found


def simulate_within(workload: Workload, speeds: Speeds, setting: Setting, limit_s: float) -> Prediction | None:
    """Do the same, but return None as soon as steps are known to take longer than a limit.

    The first step waits for no update of one before. Where the others have the same plan, they are no shorter.
    """
    run = _Run(workload, speeds, setting)
    steps: list[PlayedStep] = []
    resident: frozenset[int] = frozenset()
    seen: dict[frozenset[int], int] = {}
    length = 0
    for index in range(_MAX_STEPS + (0 if run.on_device else len(workload.units))):
        length = index - seen.get(resident, index)
        seen[resident] = index
        plan = step_plan(workload, setting, resident)
        steps.append(run.step(plan))
        if length and (run.ends_at_rest or (len(steps) > 2 * length and are_repeated(steps, length))):
            break
        left = run.left_over(plan)
        if index == 0 and left == resident and steps[0].seconds > limit_s:
            return None
        resident = left
    return mean_of(steps[-length:], host_use(workload, setting))


class _Run:
    """The lanes, the device's memory, and the clock."""

    def __init__(self, workload: Workload, speeds: Speeds, setting: Setting) -> None:
        n = len(workload.units)
        self.workload, self.speeds, self.setting = workload, speeds, setting
        self.units = workload.units
        self.num_slots = num_slots(workload, setting)
        self.policies = [setting.policy(index) for index in range(n)]
        self.link = Link(speeds)
        self.on_device = updated_there(workload, setting)
        self.anchor_bytes = workload.anchor_bytes + (workload.update_bytes if self.on_device else 0)
        self.device, self.under_way = DeviceUpdates(self.link, self._count_update), dict[int, DeviceUpdate]()
        self.in_slots: frozenset[int] = frozenset()
        self.limit_bytes = gradient_limit_bytes(workload)
        self.disk = DiskQueue(speeds, workload.ring, hands_over=setting.update != "at_once")
        self.files = ReadAhead(self.disk, workload.units, workload.ring) if workload.has_stored_units else None
        self.now = self.host_free_s = 0.0
        self.updated_s = [0.0] * n
        self.arrivals: list[Copying | DiskMove | None] = [None] * n
        self.saved_bytes = [saved_bytes(workload, setting, index) for index in range(n)]
        self.travels = [
            unit.offload_bytes if self.policies[index] == "offload" and self.saved_bytes[index] else 0
            for index, unit in enumerate(self.units)
        ]
        self.route: Route = MemoryRoute(self.travels, self._home, self._to_device)
        if "activations" in workload.in_files:
            self.route = FileRoute(self.travels, self.disk, self.link, self._home, self._to_device)
        self.held_bytes = 0
        self._begin_step()

    @property
    def ends_at_rest(self) -> bool:
        """Whether all that a step leaves to the next begins at its end, so that the second is like all others."""
        leaves_work = self.setting.update == "in_backward" or self.on_device or isinstance(self.route, FileRoute)
        return not (self.workload.trains and leaves_work)

    def _begin_step(self) -> None:
        self.stalls_s = [0.0] * len(self.units)
        self.h2d_bytes = self.d2h_bytes = self.gradient_bytes = self.num_loads = 0
        self.compute_s = self.host_s = 0.0
        self.gradients: deque[tuple[Copying, int]] = deque()
        self.to_flush, self.landed = -1, list[tuple[int, Copying]]()
        self.offloads = Offloads(self.travels, self.link, self.route)
        self.stored: list[DiskUpdate] = []
        self.peak, self.peak_at = PeakBytes(), ""

    # -- plans

    def left_over(self, plan: Plan) -> frozenset[int]:
        """What the next step finds on the device: nothing that was updated at home, or that anybody could have
        written to.
        """
        left = plan.final_resident if self.workload.undisturbed else frozenset[int]()
        unchanged = frozenset(unit for unit in left if not self._is_trained(unit))
        return unchanged | (plan.final_resident & frozenset(self.under_way))

    def _is_trained(self, index: int) -> bool:
        return self.workload.trains and self.units[index].gradient_bytes > 0 and index >= self.workload.lowest

    # -- a step

    def step(self, plan: Plan) -> PlayedStep:
        """Play one step, from its forward to the end of what comes between it and the next."""
        self._begin_step()
        self.in_slots = plan.final_resident
        start, h2d_s, d2h_s = self.now, self.link.h2d.busy_s, self.link.d2h.busy_s
        disk_s, disk_work = self.disk.busy_s, self.disk.work
        if self.files is not None:
            self.files.begin(each.unit for each in plan.actions if each.op is Op.PREFETCH)
        moves: list[Action] = []
        last_forward = sum(use.op is Op.FORWARD for use in plan.uses) - 1
        is_backward, num_uses = False, 0
        for action in plan.actions:
            if not action.is_use:
                if is_backward:
                    moves.append(action)  # when the next backward begins
                else:
                    self._move(action)
                continue
            if action.op is Op.FORWARD:
                self._forward(action.unit)
                if num_uses == last_forward and self.workload.trains:
                    self._turn()
            else:
                self._backward(action.unit, moves)
                moves, is_backward = [], True
            num_uses += 1
        end_stall_s = self._end()
        link_s = self.link.h2d.busy_s - h2d_s, self.link.d2h.busy_s - d2h_s
        busy = LaneSeconds(self.compute_s, *link_s, self.host_s, self.disk.busy_s - disk_s)
        return PlayedStep(
            self.now - start,
            busy,
            tuple(self.stalls_s),
            end_stall_s,
            self.num_loads,
            self.h2d_bytes,
            self.d2h_bytes,
            self.peak,
            self.peak_at,
            self.disk.work.since(disk_work),
        )

    def _compute(self, seconds: float) -> None:
        if self.on_device:
            self.device.advance(self.now)
            self.device.take_kernel_s()  # while compute waited
            self.device.advance(self.now + seconds)
            seconds += self.device.take_kernel_s()
        self.now += seconds
        self.compute_s += seconds

    def _wait(self, copying: Copying, unit: int) -> float:
        end_s = self.link.end_s(copying)
        if end_s > self.now:
            self.stalls_s[unit] += end_s - self.now
            self.now = end_s
        return self.now

    def _move(self, action: Action) -> None:
        if action.op is not Op.PREFETCH:
            return
        index, unit = action.unit, self.units[action.unit]
        if (update := self.under_way.pop(index, None)) is not None:
            self.device.finish(update)
            self.updated_s[index] = update.end_s
        self.num_loads += 1
        ready_s = max(self.now, self.updated_s[index])
        if self.files is None:
            self.arrivals[index] = self._to_device(unit.weight_bytes, ready_s)
        else:
            self.arrivals[index] = self.files.load(index, ready_s)

    def _count_update(self, there_bytes: int, home_bytes: int) -> None:
        self.h2d_bytes += there_bytes
        self.d2h_bytes += home_bytes

    def _to_device(self, num_bytes: int, ready_s: float | None = None) -> Copying:
        ready_s = self.now if ready_s is None else ready_s
        self.device.advance(ready_s)
        self.h2d_bytes += num_bytes
        return self.link.copy(self.link.h2d, num_bytes, ready_s)

    def _home(self, num_bytes: int, free_s: float = 0.0) -> Copying:
        self.d2h_bytes += num_bytes
        self.device.advance(self.now)
        return self.link.copy(self.link.d2h, num_bytes, max(self.now, free_s))

    def _require(self, index: int) -> None:
        self.route.note(self.now)
        self._compute(self.speeds.use_s)
        arrival, self.arrivals[index] = self.arrivals[index], None
        if self.files is not None:
            self.files.look_ahead(self.now)
        if isinstance(arrival, DiskMove):  # what is read of it goes on to the device
            arrival = self._to_device(self.units[index].weight_bytes, self.disk.end_s(arrival))
        if arrival is not None:
            self._wait(arrival, index)
        if (update := self.under_way.pop(index, None)) is not None:  # it has stayed in its slot
            self.device.finish(update, kernels_only=True)
            self.stalls_s[index] += max(0.0, update.kernels_end_s - self.now)
            self.now = max(self.now, update.kernels_end_s)

    # -- forward

    def _forward(self, index: int) -> None:
        unit = self.units[index]
        self._require(index)
        self.offloads.let_go(lambda copying: self._wait(copying, index), self.now)
        self.offloads.send()
        took = forward_peak_bytes(unit, self.policies[index], self.setting.micro_batches)
        self._note_peak(took, 0, Op.FORWARD, index)
        self._compute(unit.forward_s)
        self.held_bytes += self.saved_bytes[index]
        self.offloads.note_saved(index)

    def _turn(self) -> None:
        self._note_peak(self.workload.turn_bytes, 0, None, -1)
        self._compute(self.workload.turn_s)

    # -- backward

    def _backward(self, index: int, moves: list[Action]) -> None:
        unit = self.units[index]
        self._flush_gradients()
        self.offloads.fetch(index, self.now)
        for action in moves:
            self._move(action)
        is_in_buffer = isinstance(self.arrivals[index], DiskMove) or self.workload.shares_memory
        self._require(index)
        if is_in_buffer and self.setting.update == "in_backward" and unit.updates_weights_in_files:
            self.disk.keep(index, self.now)
        if (returning := self.offloads.arrival(index)) is not None:
            self._wait(returning, index)
        if self.policies[index] == "recompute":
            self._note_backward_peak(index, recompute_peak_bytes(unit, self.setting.micro_batches), 0)
            self._compute(unit.forward_s)
        took = backward_peak_bytes(unit, self.policies[index], self.setting.micro_batches)
        own = min(took, unit.gradient_bytes)
        self._note_backward_peak(index, took - own, own)
        while self.gradients and self.gradient_bytes + unit.gradient_bytes > self.limit_bytes:
            self._wait(self.gradients[0][0], index)
            self._let_go_of_gradients()
        beside, gradients = self._note_backward_peak(index, took - own, own)
        is_late, start_s = self.offloads.is_late(index, self.now), self.now
        self._compute(unit.backward_s)
        if is_late:
            unfreed = unfreed_backward_peak_bytes(unit, self.offloads.late_share(index, start_s, self.now))
            self._note_peak(beside + max(took, unfreed) - own, gradients, Op.BACKWARD, index)
        self.held_bytes -= self.saved_bytes[index]
        self.offloads.note_used(index)
        self.to_flush = index if self._is_trained(index) else -1

    def _note_backward_peak(self, index: int, took: int, own: int) -> tuple[int, int]:
        """Note what a backward takes; return what batches that are late hold beside it, and all gradients."""
        while self.gradients and self.link.is_over(self.gradients[0][0], self.now):
            self._let_go_of_gradients()
        late = self.offloads.late_bytes(self.now)
        gradients = min(self.gradient_bytes + own, self.limit_bytes)  # what comes first may come, the rest waits
        self._note_peak(late + took, gradients, Op.BACKWARD, index)
        return late, gradients

    def _let_go_of_gradients(self) -> None:
        self.gradient_bytes -= self.gradients.popleft()[1]

    def _flush_gradients(self) -> None:
        """The unit before has computed its backward: its gradients go home."""
        if self.to_flush >= 0:
            num_bytes = self.units[self.to_flush].gradient_bytes
            landed = self._home(num_bytes)
            self.gradients.append((landed, num_bytes))
            self.gradient_bytes += num_bytes
            self.disk.count_written(num_bytes if "gradients" in self.workload.in_files else 0)
            self.landed.append((self.to_flush, landed))
            if self.files is not None and self.setting.update == "in_backward":
                self._update_one(self.to_flush, self.link.end_s(landed))
            self.to_flush = -1

    # -- the end of a step

    def _end(self) -> float:
        """Wait for what is under way, update, and let the loop do what it does; return the wait."""
        start_s = self.now
        self._flush_gradients()
        copies = [*(landed for _, landed in self.landed), *self.offloads.under_way]
        if not self.workload.trains:
            copies = [arrival for arrival in self.arrivals if isinstance(arrival, Copying)]
        for copying in copies:
            self.now = max(self.now, self.link.end_s(copying))
        if self.workload.trains:
            self._update()
        end_stall_s = self.now - start_s
        self._compute(self.workload.between_s)
        return end_stall_s

    def _update(self) -> None:
        update = self.setting.update
        if update == "in_backward":
            for index, landed in self.landed if self.files is None else ():
                self._update_one(index, self.link.end_s(landed))
            return
        for index in sorted(index for index, _ in self.landed):
            self._update_one(index, self.now)
        if update == "at_once":
            if self.files is not None:
                self.host_free_s = max(map(self.disk.end_s, self.stored), default=self.now)
            self.compute_s += self.host_free_s - self.now if self.host_free_s > self.now else 0.0
            self.now = max(self.now, self.host_free_s)

    def _update_one(self, index: int, ready_s: float) -> None:
        unit = self.units[index]
        if index in self.on_device:
            self._update_there(index, ready_s)
            return
        self.host_s += unit.update_s
        if self.files is not None:
            self.stored.append(self.disk.update(index, index, ready_s, unit))
            return
        self.host_free_s = max(self.host_free_s, ready_s) + unit.update_s
        self.updated_s[index] = self.host_free_s

    def _update_there(self, index: int, ready_s: float) -> None:
        unit, per_step = self.units[index], self.workload.updates
        beside = unit.state_bytes + (0 if index in self.in_slots else unit.weight_bytes)
        self.under_way[index] = self.device.submit(
            DeviceUpdate(
                index,
                ready_s,
                there_bytes=round(per_step * (unit.gradient_bytes + beside)),
                home_bytes=round(per_step * (unit.weight_bytes + unit.state_bytes)),
                kernel_s=per_step * (unit.update_on_device_s or 0.0),
            )
        )

    # -- memory

    def _note_peak(self, activations: int, gradients: int, op: Op | None, index: int) -> None:
        activations += self.held_bytes - self.offloads.away_bytes
        if activations + gradients > self.peak.gradients + self.peak.activations or not self.peak_at:
            slots = self.num_slots * self.workload.slot_bytes
            self.peak = PeakBytes(slots, self.anchor_bytes, gradients, activations)
            self.peak_at = "turn" if op is None else str(Action(op, index))
