"""Parts of steps whose weights or states lie in files: read, updated and written, each by a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lightning_superpipe.engine.fetching import FetchRing, Place
from lightning_superpipe.engine.host_lane import HostEvent, HostLane, Past
from lightning_superpipe.engine.lanes import Event, Lanes
from lightning_superpipe.engine.pending import Pending, unfenced
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer.bench import Bench, StepOn
from lightning_superpipe.optimizer.ledger import Ledger
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.parts import Part
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.optimizer.stand_ins import step_on
from lightning_superpipe.optimizer.state_homes import StateHomes
from lightning_superpipe.optimizer.work_memory import Ranked, WorkMemory
from lightning_superpipe.planning.disk_tier import FileChoice
from lightning_superpipe.tiers import Tier

__all__ = ["StoredUpdates"]

Work = Callable[[Part, Pending], None]


class _Job(NamedTuple):
    """A part on its way through the three threads."""

    part: Part
    bench: Bench
    work: Callable[[], None]
    ledger: Ledger
    after: Event
    changed: HostEvent
    done: HostEvent


class StoredUpdates:
    """Runs the parts of units that lie in files.

    Parts that wait for their read are taken in the order in which the next forward needs their units: what comes home
    last in backward is needed first, and the rest runs on under the forward.

    Args:
        tier: of the session; its parts say which kinds are in files.
        files: how many buffers there are on the way to an update and back, and which units stay in memory.
        masters: runs the steps where parameters have master weights.
        lanes: of the engine; their recorder is told of reads and writes.
        fetches: of the engine, where weights are in files.
        on_failed: called by whoever is told that a step failed.
    """

    def __init__(
        self,
        tier: Tier,
        files: FileChoice,
        masters: Masters | None,
        lanes: Lanes,
        fetches: FetchRing | None,
        on_failed: Callable[[], None],
    ) -> None:
        self._in_memory, self._fetches = files.in_memory, fetches
        self._tier, self._masters, self._lanes, self._on_failed = tier, masters, lanes, on_failed
        self._step_on: StepOn = step_on if masters is None else masters.step_on
        states = tier.part("states")
        self.homes = None if states.is_memory else StateHomes(states)
        self._memory = WorkMemory(tier.part("wire"), files.ring)
        self._waiting: Ranked[_Job] = Ranked()
        self._reads, self._lane = HostLane("superpipe-read-states"), HostLane("superpipe-update")
        self._writes = HostLane("superpipe-write")
        self._ledger: Ledger | None = None
        self._num_steps = 0

    @property
    def ledger(self) -> Ledger:
        """Of the step under way; made with its first part."""
        if self._ledger is None:
            self._ledger = Ledger(self._tier, self._on_failed)
        return self._ledger

    def expect(self, units: Container[int]) -> None:
        """Units will be updated as soon as their gradients are home: what backward reads of them may stay for that."""
        if self._fetches is not None:
            self._fetches.awaited = units

    def part(
        self, unit: Unit, optimizer: Optimizer, groups: list[dict[str, Any]], some: Sequence[Member]
    ) -> tuple[Part, Bench]:
        """Return a part whose states are in their files, as far as there are any."""
        self._adopt(unit, optimizer)
        states = None if self.homes is None else self.homes.slab(unit, optimizer)
        bench = Bench(unit, some, states, self._step_on, self._fetches, can_undo=self._tier.can_undo)
        also = unit.in_slab() if bench.writes_weights else []
        return Part(bench.narrow, optimizer, groups, some, also=also), bench

    def _adopt(self, unit: Unit, optimizer: Optimizer) -> None:
        """Move a unit's states into files, if they belong there."""
        if self.homes is None:
            return
        if self._has_home(unit):
            self.homes.adopt(unit, optimizer)
        else:  # perhaps no longer: a parameter that leaves its unit takes along what was trained
            self.homes.leave(unit, optimizer)

    def _has_home(self, unit: Unit) -> bool:
        """Whether states live in files; where little of a unit is trained they stay in memory, as what is trained."""
        return unit.is_mostly_trained and unit.index not in self._in_memory

    def start(self, part: Part, bench: Bench, work: Work, after: Event, rank: int) -> Pending:
        """Read, update and write a unit, each as soon as it can be; the end comes in any case, see :class:`Ledger`.

        Args:
            work: runs the part.
            after: completes its gradients.
            rank: of those that wait for their read, the lowest comes first.
        """
        ledger, changed, done = self.ledger, HostEvent(), HostEvent()
        pending = Pending(part.tensors(), done, partial(_settled, bench.unit, ledger))
        if isinstance(after, Past):
            try:
                part.take_gradients(pending)
            except BaseException:
                done.set()  # nobody shall wait for what never starts
                raise
        bench.note_kept()
        pending.left_over = bench
        if bench.leaves_weights:
            pending.changed = changed
        self._memory.grow(bench.room_bytes)
        job = _Job(part, bench, partial(work, part, pending), ledger, after, changed, done)
        self._waiting.push((self._num_steps, rank), job)
        self._reads.submit(self._read_next, after=Past())
        return pending

    def _read_next(self) -> None:
        """Read what is most urgent now, and hand it on to the two other threads."""
        place = self._memory.take()
        job = self._waiting.pop()
        fetched = HostEvent()
        try:
            if not job.ledger.has_failed:
                job.bench.fetch(place, self._lanes.recorder)
        except BaseException as error:
            fetched.error = error
        fetched.set()
        updated = self._lane.submit(partial(_update, job, fetched), after=job.after)
        self._writes.submit(partial(self._publish, job, place, updated), after=Past(), done=job.done)

    def _publish(self, job: _Job, place: Place, updated: HostEvent) -> None:
        unit, ledger = job.bench.unit, job.ledger
        try:
            updated.synchronize()
            if not ledger.has_failed:
                job.bench.publish(job.part.optimizer, ledger, self._lanes.recorder)
                if job.bench.has_made_states:
                    self._adopt(unit, job.part.optimizer)
        except BaseException as error:
            ledger.fail(unit.name, error)
        finally:
            job.changed.set()
            job.bench.give_back()
            self._memory.give_back(place)

    def adopt(self, optimizer: Optimizer, units: Iterable[Unit]) -> None:
        """Move states that an optimizer has or has loaded into files, and take the room that others will need there.

        Raises:
            BudgetError: the disk has no room for them.
        """
        if self.homes is None:
            return
        units = list(units)
        for unit in units:
            self._adopt(unit, optimizer)
        stored = list(filter(self._has_home, units))
        self.homes.reserve(optimizer, stored, with_masters=self._masters is not None)

    def finish(self) -> None:
        """All parts of the step have been started."""
        self.expect(())
        ledger, self._ledger = self._ledger, None
        self._num_steps += 1
        if ledger is not None:  # behind the last of its parts, which the reading thread hands on
            self._reads.submit(partial(self._commit, ledger), after=Past())

    def _commit(self, ledger: Ledger) -> None:
        self._writes.submit(ledger.commit, after=Past())

    def abandon(self) -> bool:
        """No step follows the parts that have run, and nothing is under way; return whether they were undone."""
        self.expect(())
        ledger, self._ledger = self._ledger, None
        self._num_steps += 1
        if ledger is None:
            return False
        if self._tier.can_undo:
            ledger.undo()
            self._on_failed()
        else:
            ledger.commit()
        return self._tier.can_undo

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        for lane in (self._reads, self._lane, self._writes):
            lane.close()
        self._memory.close()


def _update(job: _Job, fetched: HostEvent) -> None:
    fetched.synchronize()
    part, ledger = job.part, job.ledger
    if job.bench.is_in_place:
        with ledger.lock, unfenced():  # a part that fails undoes this as well
            if not ledger.has_failed:
                ledger.remember(part.optimizer, part.members)
                job.work()
    elif not ledger.has_failed:
        job.work()
        job.bench.note_updated(ledger)
        job.changed.set()


def _settled(unit: Unit, ledger: Ledger, pending: Pending) -> None:
    unit.note_settled(pending)
    if ledger.has_failed:  # what was copied behind it may have been undone since
        unit.distrust()
    ledger.tell()
