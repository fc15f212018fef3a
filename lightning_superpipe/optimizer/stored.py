"""Parts of steps whose weights or states lie in files: read, updated and written, each by a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_superpipe.engine.fetching import Ring
from lightning_superpipe.engine.host_lane import HostEvent, HostLane, Past
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.pending import Pending
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer.bench import Bench, StepOn
from lightning_superpipe.optimizer.ledger import Ledger
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.parts import Part
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.optimizer.stand_ins import step_on
from lightning_superpipe.optimizer.state_homes import StateHomes
from lightning_superpipe.optimizer.state_size import missing_state_bytes
from lightning_superpipe.tiers import Tier

__all__ = ["StoredUpdates"]

Work = Callable[[Part, Pending], None]


class StoredUpdates:
    """Runs the parts of units that lie in files.

    Args:
        tier: of the session; its parts say which kinds are in files.
        num_buffers: for units on their way from files to their update and back.
        masters: runs the steps where parameters have master weights.
        on_failed: called by whoever is told that a step failed.
    """

    def __init__(self, tier: Tier, num_buffers: int, masters: Masters | None, on_failed: Callable[[], None]) -> None:
        self._tier, self._masters, self._on_failed = tier, masters, on_failed
        self._step_on: StepOn = step_on if masters is None else masters.step_on
        states = tier.part("states")
        self.homes = None if states.is_memory else StateHomes(states)
        self._ring = Ring(tier.part("wire"), num_buffers)
        self._reads, self._lane = HostLane("superpipe-read-states"), HostLane("superpipe-update")
        self._writes = HostLane("superpipe-write")
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """Of the step under way; made with its first part."""
        if self._ledger is None:
            self._ledger = Ledger(self._tier, self._on_failed)
        return self._ledger

    def part(
        self, unit: Unit, optimizer: Optimizer, groups: list[dict[str, Any]], some: Sequence[Member]
    ) -> tuple[Part, Bench]:
        """Return a part whose states are in their files, as far as there are any."""
        self._adopt(unit, optimizer)
        states = None if self.homes is None else self.homes.slab(unit, optimizer)
        bench = Bench(unit, some, states, self._step_on, can_undo=self._tier.can_undo)
        also = unit.in_slab() if bench.writes_weights else []
        return Part(bench.narrow, optimizer, groups, some, also=also), bench

    def _adopt(self, unit: Unit, optimizer: Optimizer) -> None:
        """Move a unit's states into files; where little of it is trained they stay in memory, as what is trained."""
        if self.homes is not None and unit.is_mostly_trained:
            self.homes.adopt(unit, optimizer)

    def start(self, part: Part, bench: Bench, work: Work, *, after: Event, done: HostEvent) -> Pending:
        """Read, update and write a unit, each as soon as it can be; ``done`` passes in any case, see :class:`Ledger`.

        Args:
            work: runs the part.
        """
        ledger, unit = self.ledger, bench.unit
        pending = Pending(part.tensors(), done, partial(_settled, unit, ledger))
        buffer = self._ring.take(bench.room_bytes)
        assert buffer is not None, "nobody holds these buffers"
        bench.take(buffer, until=done)
        fetched = self._reads.submit(bench.fetch, after=Past())
        if isinstance(after, Past):
            try:
                part.take_gradients(pending)
            except BaseException:
                done.set()  # nobody shall wait for what never starts
                raise

        def update() -> None:
            fetched.synchronize()
            if not ledger.has_failed:
                work(part, pending)

        def publish() -> None:
            try:
                updated.synchronize()
                if not ledger.has_failed:
                    bench.publish(part.optimizer, ledger)
                    self._adopt(unit, part.optimizer)
            except BaseException as error:
                ledger.fail(unit.name, error)

        updated = self._lane.submit(update, after=after)
        self._writes.submit(publish, after=Past(), done=done)
        return pending

    def adopt(self, optimizer: Optimizer, units: Iterable[Unit]) -> None:
        """Move states that an optimizer has or has loaded into files, and take the room that the others will need.

        Raises:
            BudgetError: the disk has no room for them.
        """
        if self.homes is None:
            return
        for unit in units:
            self._adopt(unit, optimizer)
        missing = missing_state_bytes(optimizer, with_masters=self._masters is not None)
        self._tier.part("states").reserve(missing)

    def finish(self) -> None:
        """All parts of the step have been started."""
        if self._ledger is not None:
            self._writes.submit(self._ledger.commit, after=Past())
        self._ledger = None

    def abandon(self) -> bool:
        """No step follows the parts that have run, and nothing is under way; return whether they were undone."""
        ledger, self._ledger = self._ledger, None
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
        self._ring.close()


def _settled(unit: Unit, ledger: Ledger, pending: Pending) -> None:
    unit.note_settled(pending)
    ledger.tell()
