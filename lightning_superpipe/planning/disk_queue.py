"""A disk and what it feeds, as a simulation sees them: loads and updates share it, and each waits for what it needs.

Three threads of the engine use the disk, each for one request after the other: loads in the order of the plan, reads
for updates in the order of need, and writes. Whatever runs at once shares the disk, for reads and writes at once are no
faster than one after the other. Updates work in a few places; what one has left there needs no read by the next load.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from lightning_superpipe.planning.workload import Curve, Setting, Speeds, UnitWork, Workload

__all__ = ["DiskLoad", "DiskQueue", "DiskUpdate", "ReadAhead", "files_of"]


class DiskUpdate:
    """An update of one unit: read, run, written.

    Attributes:
        run_s: when it has run, so that its weights are in memory; NaN as long as nobody knows.
        end_s: when it is written; likewise.
    """

    __slots__ = ("end_s", "rank", "read_s", "ready_s", "run_s", "turn", "unit", "update_s", "weights_s", "write_s")

    def __init__(self, unit: int, rank: int, ready_s: float, disk: DiskQueue, work: UnitWork) -> None:
        self.unit, self.rank, self.ready_s, self.update_s = unit, rank, ready_s, work.update_s
        self.weights_s = disk.read.seconds(work.disk_read_bytes) if work.disk_read_bytes else 0.0
        self.read_s = disk.read.seconds(work.disk_update_bytes) if work.disk_update_bytes else 0.0
        self.write_s = disk.write.seconds(work.disk_write_bytes) if work.disk_write_bytes else 0.0
        self.turn = -1
        self.run_s = self.end_s = math.nan

    @property
    def leaves_weights(self) -> bool:
        """Whether it holds the unit's weights in memory when it is over."""
        return 0.0 < self.weights_s <= self.read_s


class DiskLoad:
    """Weights on their way to host memory, behind the update of their unit.

    Attributes:
        end_s: when they are there; NaN as long as nobody knows.
    """

    __slots__ = ("behind", "end_s", "ready_s", "seconds")

    def __init__(self, ready_s: float, seconds: float, behind: DiskUpdate | None) -> None:
        self.ready_s, self.seconds, self.behind = ready_s, seconds, behind
        self.end_s = math.nan


class _Head:
    """What a thread is busy with."""

    __slots__ = ("job", "left_s")

    def __init__(self, job: DiskLoad | DiskUpdate, left_s: float) -> None:
        self.job, self.left_s = job, left_s


class DiskQueue:
    """The disk, the updates that it feeds, and the thread that runs them.

    Time is played up to the moment that somebody asks about. What is handed over later begins later.

    Args:
        read, write: of one request, alone.
        num_places: updates between the begin of their read and the end of their write; as many units' weights are
            kept from a backward to their update.
        hands_over: loads find what updates have left; not where all are over before anything is loaded.

    >>> disk = DiskQueue(Curve.steady(10.0), Curve.steady(10.0), 2)
    >>> unit = UnitWork("h", 10, update_s=1.0, disk_read_bytes=10, disk_update_bytes=20, disk_write_bytes=20)
    >>> update = disk.update(0, 0, 0.0, unit)
    >>> load = disk.load(0, 0.0, unit)
    >>> disk.end_s(update), disk.end_s(load)
    (5.0, 3.0)
    >>> disk.end_s(disk.load(1, 0.0, unit)), disk.busy_s
    (6.0, 5.0)
    """

    def __init__(self, read: Curve, write: Curve, num_places: int, *, hands_over: bool = True) -> None:
        self.read, self.write, self._num_places, self._hands_over = read, write, num_places, hands_over
        self.now_s = self.busy_s = self.host_s = 0.0
        self._loads: deque[DiskLoad] = deque()
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

    def load(self, unit: int, ready_s: float, work: UnitWork) -> DiskLoad:
        """Read a unit's weights, behind all loads before."""
        seconds = self.read.seconds(work.disk_read_bytes) if work.disk_read_bytes else 0.0
        load = DiskLoad(ready_s, seconds, self._latest.get(unit))
        self._loads.append(load)
        return load

    def keep(self, unit: int) -> None:
        """What a load has just brought stays in memory for the unit's update, as long as there is room."""
        self._kept.pop(unit, None)
        if len(self._kept) + len(self._lent) >= self._num_places and self._kept:
            del self._kept[next(iter(self._kept))]
        if len(self._lent) < self._num_places:
            self._kept[unit] = None

    def update(self, unit: int, rank: int, ready_s: float, work: UnitWork) -> DiskUpdate:
        """Update a unit once its gradients are home; of those that wait, the lowest rank comes first."""
        update = self._latest[unit] = DiskUpdate(unit, rank, ready_s, self, work)
        self._waiting.append(update)
        return update

    def end_s(self, job: DiskLoad | DiskUpdate) -> float:
        """Return when something is over."""
        self._begin()
        while math.isnan(job.end_s):
            self._play()
            self._begin()
        return job.end_s

    # -- time

    def _play(self) -> None:
        """Go on to the next moment at which something begins or ends."""
        heads = [head for head in (self._loading, self._reading, self._writing) if head is not None]
        moments = [self.now_s + head.left_s * len(heads) for head in heads]
        moments += [each.ready_s for each in self._waiting if each.ready_s > self.now_s]
        moments += [load.ready_s for load in list(self._loads)[:1] if load.ready_s > self.now_s]
        if self._to_run:
            moments.append(max(self._run_end_s, self.now_s))
        assert moments, "whoever is waited for was handed over before"
        next_s = min(moments)
        passed_s = next_s - self.now_s
        self.busy_s += passed_s if heads else 0.0
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
                self._loading = _Head(load, load.seconds)
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
            self._reading = _Head(update, update.read_s - (update.weights_s if is_kept else 0.0))
        if self._writing is None and self._to_write:
            update = self._to_write.popleft()
            self._writing = _Head(update, update.write_s)

    def _may_load(self, load: DiskLoad) -> bool:
        update = load.behind
        if load.ready_s > self.now_s or update is None:
            return load.ready_s <= self.now_s
        return (update.run_s if self._is_in_memory(update) else update.end_s) <= self.now_s

    def _is_in_memory(self, update: DiskUpdate | None) -> bool:
        """Whether an update's place has not been taken by another since."""
        if update is None or not (self._hands_over and update.leaves_weights):
            return False
        return self._num_begun - update.turn < self._num_places

    def _end(self) -> None:
        """Let each thread hand on what it has done."""
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
            self.host_s += self._to_run[0].update_s
            self._run_end_s = self.now_s + self._to_run[0].update_s


class ReadAhead:
    """Loads of one step after another, a few of which are read before a slot is free for them."""

    def __init__(self, disk: DiskQueue, units: Sequence[UnitWork], ring: int) -> None:
        self.disk, self._units, self._ring = disk, units, ring
        self._to_come: deque[int] = deque()
        self._ahead: deque[tuple[int, DiskLoad]] = deque()

    def begin(self, loads: Iterable[int]) -> None:
        """A step begins that will load these units."""
        self._to_come = deque(loads)
        self._ahead.clear()

    def load(self, unit: int, ready_s: float) -> DiskLoad:
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


def files_of(workload: Workload, speeds: Speeds, setting: Setting) -> ReadAhead | None:
    """Return the way from files; None where nothing lies there, or no disk was measured."""
    has_files = any(unit.disk_read_bytes or unit.disk_update_bytes for unit in workload.units)
    if not has_files or speeds.disk_read is None or speeds.disk_write is None:
        return None
    hands_over = setting.update != "at_once"
    disk = DiskQueue(speeds.disk_read, speeds.disk_write, workload.ring, hands_over=hands_over)
    return ReadAhead(disk, workload.units, workload.ring)
