"""A second simulator, written to be obvious: everything that works goes on by one tick, then all look around again.

It shares with the package's only the plan. Its loop is a generator that works or waits, as the engine's caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lightning_superpipe.planning import Op, Setting, Speeds, Workload, lower_window, spread, training_order

TICK_S = 1.0


@dataclass
class Job:
    """Work on a lane; it may begin when ``may_begin`` says so."""

    left_s: float
    may_begin: Callable[[], bool]
    is_done: bool = False
    end_s: float = -1.0
    num_bytes: int = 0


@dataclass
class Lane:
    """Jobs, the first of which is worked on."""

    jobs: list[Job] = field(default_factory=list)

    def put(self, seconds: float, may_begin: Callable[[], bool], num_bytes: int = 0) -> Job:
        job = Job(seconds, may_begin, num_bytes=num_bytes)
        self.jobs.append(job)
        return job

    def is_busy(self) -> bool:
        return bool(self.jobs) and self.jobs[0].may_begin()


class Ticking:
    """Plays steps of training tick by tick; all seconds must be multiples of a tick."""

    def __init__(self, workload: Workload, speeds: Speeds, setting: Setting, *, num_steps: int) -> None:
        self.workload, self.speeds, self.setting = workload, speeds, setting
        self.h2d, self.d2h, self.host = Lane(), Lane(), Lane()
        self.now, self.num_steps = 0.0, num_steps
        self.step_ends: list[float] = []
        self.updates: dict[int, Job] = {}

    def run(self) -> float:
        """Return how long the last step took."""
        program = self._steps()
        wish = next(program)
        while True:
            wish, is_over = self._settle(program, wish)
            if is_over:
                return self.step_ends[-1] - self.step_ends[-2]
            self._tick()
            if isinstance(wish, float):
                wish -= TICK_S

    def _settle(self, program: Iterator, wish):  # what can happen now without time passing
        changes = True
        while changes:
            changes = False
            for lane in (self.h2d, self.d2h, self.host):
                while lane.is_busy() and lane.jobs[0].left_s <= 1e-9:
                    job = lane.jobs.pop(0)
                    job.is_done, job.end_s, changes = True, self.now, True
            while (wish <= 1e-9) if isinstance(wish, float) else wish():
                changes = True
                try:
                    wish = next(program)
                except StopIteration:
                    return wish, True
        return wish, False

    def _tick(self) -> None:
        self.now += TICK_S
        busy = [lane for lane in (self.h2d, self.d2h, self.host) if lane.is_busy()]
        for lane in busy:
            lane.jobs[0].left_s -= TICK_S

    # -- the engine's program

    def _steps(self):
        for _ in range(self.num_steps):
            yield from self._step()
            self.step_ends.append(self.now)

    def _load(self, unit: int) -> Job:
        update = self.updates.get(unit)
        num_bytes = self.workload.units[unit].weight_bytes
        return self.h2d.put(self.speeds.h2d.seconds(num_bytes), lambda: update is None or update.is_done)

    def _step(self):
        units, setting, n = self.workload.units, self.setting, len(self.workload.units)
        slots = min(setting.k + setting.resident, n)
        keep = spread(range(n), slots - min(setting.k, n))
        order = training_order(n, self.workload.lowest)
        plan = lower_window(order, k=slots, k_prime=setting.k_prime, keep=keep)
        limit = 2 * max(unit.gradient_bytes for unit in units)
        arrival: dict[int, Job] = {}
        on_way: list[Job] = []  # gradients
        batch: int | None = None
        sent: list[tuple[int, Job]] = []
        on_host: set[int] = set()
        back: dict[int, Job] = {}
        gradients: dict[int, Job] = {}
        to_ship: int | None = None
        delayed = []

        def ship():
            nonlocal to_ship
            if to_ship is not None and units[to_ship].gradient_bytes:
                size = units[to_ship].gradient_bytes
                gradients[to_ship] = self.d2h.put(self.speeds.d2h.seconds(size), lambda: True, size)
                on_way.append(gradients[to_ship])
            to_ship = None

        for op, unit in plan.actions:
            if op is Op.PREFETCH:
                if to_ship is None:
                    arrival[unit] = self._load(unit)
                else:
                    delayed.append(unit)
            elif op is Op.FORWARD:
                yield lambda a=arrival[unit]: a.is_done
                while sent and (len(sent) > 1 or sent[0][1].is_done):
                    yield lambda j=sent[0][1]: j.is_done
                    on_host.add(sent.pop(0)[0])
                if batch is not None:
                    seconds = self.speeds.d2h.seconds(units[batch].offload_bytes)
                    sent.append((batch, self.d2h.put(seconds, lambda: True)))
                batch = unit if setting.policy(unit) == "offload" and unit >= self.workload.lowest else None
                yield units[unit].forward_s
                if unit == n - 1:
                    yield self.workload.turn_s
            elif op is Op.BACKWARD:
                ship()
                if setting.policy(unit) == "offload":
                    while sent and sent[0][1].is_done:
                        sent.pop(0)
                    below = [u for u in range(unit) if setting.policy(u) == "offload" and u >= self.workload.lowest]
                    for each in (unit, *below[-1:]):
                        if each in on_host:
                            on_host.remove(each)
                            seconds = self.speeds.h2d.seconds(units[each].offload_bytes)
                            back[each] = self.h2d.put(seconds, lambda: True)
                for each in delayed:
                    arrival[each] = self._load(each)
                delayed = []
                if unit in arrival:
                    yield lambda a=arrival[unit]: a.is_done
                if unit in back:
                    yield lambda a=back[unit]: a.is_done
                if setting.policy(unit) == "recompute":
                    yield units[unit].forward_s
                own = units[unit].gradient_bytes
                yield lambda own=own: own + sum(j.num_bytes for j in on_way if not j.is_done) <= limit
                yield units[unit].backward_s
                to_ship = unit
        ship()
        yield lambda: all(job.is_done for job in (*gradients.values(), *(job for _, job in sent)))
        if setting.update == "in_backward":
            # Each follows its gradient: rebuilt here from when those came home.
            free = max([job.end_s for job in self.updates.values()], default=0.0)
            for unit, job in gradients.items():
                free = max(free, job.end_s) + units[unit].update_s
                self.updates[unit] = self.host.put(0.0, lambda at=free: self.now >= at - 1e-9)
        else:
            for unit in sorted(gradients):
                self.updates[unit] = self.host.put(units[unit].update_s, lambda: True)
            if setting.update == "at_once":
                yield lambda: not self.host.jobs
        yield self.workload.between_s
