"""A disk and what it feeds, as a simulation sees them: loads and updates share it, and each waits for what it needs.

Threads of the engine use the disk, each for one request after the other: loads in the order of the plan, reads for
updates in the order of need, and their writes; activations are written by one more and read by another. Whatever runs
at once shares the disk, for reads and writes at once are no faster than one after the other. Updates work in a few
places; what one has left there needs no read by the next load.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from lightning_superpipe.planning.disk_work import DiskWork
from lightning_superpipe.planning.workload import Speeds, UnitWork

__all__ = ["DiskMove", "DiskQueue", "DiskUpdate", "ReadAhead"]


class DiskUpdate:
    """An update of one unit: read, run, written.

    Attributes:
        run_s: when it has run, so that its weights are in memory; NaN as long as nobody knows.
        end_s: when it is written; likewise.
    """

    __slots__ = ("end_s", "rank", "ready_s", "run_s", "turn", "unit", "work")

    def __init__(self, unit: int, rank: int, ready_s: float, work: UnitWork) -> None:
        self.unit, self.rank, self.ready_s, self.work = unit, rank, ready_s, work
        self.turn = -1
        self.run_s = self.end_s = math.nan


class DiskMove:
    """Weights on their way to host memory, behind the update of their unit; or activations, read behind their write.

    Attributes:
        end_s: when it is over; NaN as long as nobody knows.
    """

    __slots__ = ("behind", "end_s", "num_bytes", "ready_s")

    def __init__(self, ready_s: float, num_bytes: int, behind: DiskUpdate | DiskMove | None = None) -> None:
        self.ready_s, self.num_bytes, self.behind = ready_s, num_bytes, behind
        self.end_s = math.nan

    def may_begin(self, now_s: float) -> bool:
        """Whether it is ready, and what it comes behind is over."""
        return self.ready_s <= now_s and (self.behind is None or self.behind.end_s <= now_s)


class _Head:
    """What a thread is busy with."""

    __slots__ = ("job", "left_s")

    def __init__(self, job: DiskMove | DiskUpdate, left_s: float) -> None:
        self.job, self.left_s = job, left_s


class _Mover:
    """A thread that moves activations one way."""

    def __init__(self) -> None:
        self.queue: deque[tuple[DiskMove, float]] = deque()
        self.head: _Head | None = None

    def hand_over(self, move: DiskMove, seconds: float) -> DiskMove:
        self.queue.append((move, seconds))
        return move

    def begin(self, now_s: float) -> None:
        """Take what comes next, if it may begin."""
        if self.head is None and self.queue and self.queue[0][0].may_begin(now_s):
            self.head = _Head(*self.queue.popleft())

    def end(self, now_s: float) -> None:
        if self.head is not None and self.head.left_s <= 0.0:
            self.head.job.end_s, self.head = now_s, None


class DiskQueue:
    """The disk, the updates that it feeds, and the thread that runs them.

    Time is played up to the moment that somebody asks about. What is handed over later begins later.

    Args:
        speeds: of one read or write, alone; a disk that nobody has measured takes no time.
        num_places: updates between the begin of their read and the end of their write; as many units' weights are
            kept from a backward to their update.
        hands_over: loads find what updates have left; not where all are over before anything is loaded.

    >>> from lightning_superpipe.planning.workload import Curve
    >>> steady = Curve.steady(10.0)
    >>> disk = DiskQueue(Speeds(steady, steady, disk_read=steady, disk_write=steady), 2)
    >>> unit = UnitWork("h", 10, update_s=1.0, disk_read_bytes=10, disk_update_bytes=20, disk_write_bytes=20)
    >>> update = disk.update(0, 0, 0.0, unit)
    >>> load = disk.load(0, 0.0, unit)
    >>> disk.end_s(update), disk.end_s(load)
    (5.0, 3.0)
    >>> disk.end_s(disk.load(1, 0.0, unit)), disk.busy_s
    (6.0, 5.0)
    >>> disk.end_s(disk.read(6.0, 10, behind=disk.write(6.0, 20))), disk.work
    (9.0, DiskWork(read_bytes=40, written_bytes=40))
    """

    def __init__(self, speeds: Speeds, num_places: int, *, hands_over: bool = True) -> None:
        self._speeds = speeds
        self._num_places, self._hands_over = num_places, hands_over
        self._read_bytes = self._written_bytes = 0
        self._sender, self._fetcher = _Mover(), _Mover()
        self.now_s = self.busy_s = 0.0
        self._loads: deque[DiskMove] = deque()
        self._waiting: list[DiskUpdate] = []
        self._to_run: deque[DiskUpdate] = deque()
        self._to_write: deque[DiskUpdate] = deque()
        self._reading: _Head | None = None
        self._writing: _Head | None = None
        self._loading: _Head | None = None
        self._run_end_s = math.nan
        self._num_taken = self._num_begun = 0
        self._latest: dict[int, DiskUpdate] = {}
        self._kept: dict[int, None] = {}
        self._lent: set[int] = set()

    # -- what is asked of it

    def load(self, unit: int, ready_s: float, work: UnitWork) -> DiskMove:
        """Read a unit's weights, behind all loads before."""
        load = DiskMove(ready_s, work.disk_read_bytes, self._latest.pop(unit, None))  # the first behind it is the last
        self._loads.append(load)
        return load

    def keep(self, unit: int, now_s: float) -> None:
        """A backward begins: the unit's weights stay in memory for its update, as long as there is room."""
        self._advance(now_s)
        self._kept.pop(unit, None)
        if len(self._kept) + len(self._lent) >= self._num_places and self._kept:
            del self._kept[next(iter(self._kept))]
        if len(self._lent) < self._num_places:
            self._kept[unit] = None

    def update(self, unit: int, rank: int, ready_s: float, work: UnitWork) -> DiskUpdate:
        """Update a unit once its gradients are home; of those that wait, the lowest rank comes first."""
        update = self._latest[unit] = DiskUpdate(unit, rank, ready_s, work)
        self._waiting.append(update)
        return update

    def write(self, ready_s: float, num_bytes: int) -> DiskMove:
        """Write activations, behind all that were handed over before."""
        return self._sender.hand_over(DiskMove(ready_s, num_bytes), self._writing_s(num_bytes))

    def read(self, ready_s: float, num_bytes: int, behind: DiskMove) -> DiskMove:
        """Read activations, behind all reads of others before, and behind their own write."""
        return self._fetcher.hand_over(DiskMove(ready_s, num_bytes, behind), self._reading_s(num_bytes))

    def count_written(self, num_bytes: int) -> None:
        """So many bytes are written in a mapping, when the system wants it."""
        self._written_bytes += num_bytes

    @property
    def work(self) -> DiskWork:
        """Bytes of all requests so far."""
        return DiskWork(self._read_bytes, self._written_bytes)

    def end_s(self, job: DiskMove | DiskUpdate) -> float:
        """Return when something is over."""
        self._begin()
        while math.isnan(job.end_s):
            self._play()
            self._begin()
        return job.end_s

    # -- time

    def _advance(self, until_s: float) -> None:
        """Go on to some time, if it is not later already."""
        self._begin()
        while self.now_s < until_s:
            self._play(until_s)
            self._begin()

    def _play(self, until_s: float = math.inf) -> None:
        """Go on to the next moment at which something begins or ends, but not beyond ``until_s``."""
        movers = (self._sender, self._fetcher)
        busy = (self._loading, self._reading, self._writing, *(mover.head for mover in movers))
        heads = [head for head in busy if head is not None]
        moments = [self.now_s + head.left_s * len(heads) for head in heads]
        moments += [each.ready_s for each in self._waiting if each.ready_s > self.now_s]
        firsts = [*(mover.queue[0][0] for mover in movers if mover.queue), *list(self._loads)[:1]]
        moments += [first.ready_s for first in firsts if first.ready_s > self.now_s]
        if self._to_run:
            moments.append(max(self._run_end_s, self.now_s))
        next_s = min([*moments, until_s])
        assert math.isfinite(next_s), "whoever is waited for was handed over before"
        passed_s = next_s - self.now_s
        for head, end_s in zip(heads, moments, strict=False):
            head.left_s = 0.0 if end_s <= next_s else head.left_s - passed_s / len(heads)
        self.now_s = next_s
        self._end()

    def _begin(self) -> None:
        """Let each thread take what it can."""
        while self._loading is None and self._loads and self._may_load(self._loads[0]):
            load = self._loads.popleft()
            if self._is_in_memory(load.behind):
                load.end_s = self.now_s
            else:
                self._loading = _Head(load, self._reading_s(load.num_bytes))
        ready = [each for each in self._waiting if each.ready_s <= self.now_s]
        if self._reading is None and ready and self._num_taken < self._num_places:
            update = min(ready, key=lambda each: each.rank)
            self._waiting.remove(update)
            self._num_taken += 1
            update.turn = self._num_begun = self._num_begun + 1
            is_kept = update.unit in self._kept
            if is_kept:
                del self._kept[update.unit]
                self._lent.add(update.unit)
            states = update.work.disk_state_bytes
            weights_s = 0.0 if is_kept else self._reading_s(update.work.disk_update_bytes - states)
            self._reading = _Head(update, weights_s + self._reading_s(states))
        if self._writing is None and self._to_write:
            update = self._to_write.popleft()
            states = update.work.disk_state_bytes
            weights_s = self._writing_s(update.work.disk_write_bytes - states)
            self._writing = _Head(update, weights_s + self._writing_s(states))
        for mover in (self._sender, self._fetcher):
            mover.begin(self.now_s)

    def _reading_s(self, num_bytes: int) -> float:
        """Count a read; return its seconds, alone."""
        seconds = self._speeds.read_s(num_bytes)
        self._read_bytes += num_bytes
        self.busy_s += seconds
        return seconds

    def _writing_s(self, num_bytes: int) -> float:
        """Count a write; return its seconds, alone."""
        seconds = self._speeds.write_s(num_bytes)
        self._written_bytes += num_bytes
        self.busy_s += seconds
        return seconds

    def _may_load(self, load: DiskMove) -> bool:
        behind = load.behind
        if isinstance(behind, DiskUpdate) and self._is_in_memory(behind):
            return load.ready_s <= self.now_s and behind.run_s <= self.now_s
        return load.may_begin(self.now_s)

    def _is_in_memory(self, behind: DiskUpdate | DiskMove | None) -> bool:
        """Whether an update leaves weights in its place, which has not been taken by another since."""
        if not (isinstance(behind, DiskUpdate) and self._hands_over and behind.work.updates_weights_in_files):
            return False
        return self._num_begun - behind.turn < self._num_places

    def _end(self) -> None:
        """Let each thread hand on what it has done."""
        for mover in (self._sender, self._fetcher):
            mover.end(self.now_s)
        if self._loading is not None and self._loading.left_s <= 0.0:
            self._loading.job.end_s, self._loading = self.now_s, None
        if self._writing is not None and self._writing.left_s <= 0.0:
            written = self._writing.job
            written.end_s, self._writing = self.now_s, None
            assert isinstance(written, DiskUpdate), "only updates are written"
            self._num_taken -= 1
            self._lent.discard(written.unit)
        if self._to_run and self._run_end_s <= self.now_s:
            changed = self._to_run.popleft()
            changed.run_s = self.now_s
            self._to_write.append(changed)
            self._run_next()
        if self._reading is not None and self._reading.left_s <= 0.0:
            update = self._reading.job
            assert isinstance(update, DiskUpdate), "only updates are read here"
            self._reading = None
            self._to_run.append(update)
            if len(self._to_run) == 1:
                self._run_next()

    def _run_next(self) -> None:
        if self._to_run:
            self._run_end_s = self.now_s + self._to_run[0].work.update_s


class ReadAhead:
    """Loads of one step after another, a few of which are read before a slot is free for them."""

    def __init__(self, disk: DiskQueue, units: Sequence[UnitWork], ring: int) -> None:
        self.disk, self._units, self._ring = disk, units, ring
        self._to_come: deque[int] = deque()
        self._ahead: deque[tuple[int, DiskMove]] = deque()

    def begin(self, loads: Iterable[int]) -> None:
        """A step begins that will load these units."""
        self._to_come = deque(loads)
        self._ahead.clear()

    def load(self, unit: int, ready_s: float) -> DiskMove:
        """A slot is free for a unit: read it, unless that has begun."""
        if self._to_come and self._to_come[0] == unit:
            self._to_come.popleft()
        if self._ahead and self._ahead[0][0] == unit:
            return self._ahead.popleft()[1]
        return self.disk.load(unit, ready_s, self._units[unit])

    def look_ahead(self, now_s: float) -> None:
        """Read what comes next, as far as buffers allow; one stays for surprises."""
        while self._to_come and len(self._ahead) < self._ring - 1:
            unit = self._to_come.popleft()
            if self._units[unit].disk_read_bytes:
                self._ahead.append((unit, self.disk.load(unit, now_s, self._units[unit])))
