"""Residency: which units are on the device. Loads, evicts, and carries out what the plan moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.casting import write_home
from lightning_superpipe.engine.casts import Casts
from lightning_superpipe.engine.fetching import Fetched, FetchRing
from lightning_superpipe.engine.follower import Follower
from lightning_superpipe.engine.host_lane import Past
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.slots import Slot, SlotPool
from lightning_superpipe.engine.staging import Staged, WireStaging
from lightning_superpipe.engine.traded_slots import TradedSlots
from lightning_superpipe.engine.twins import release_memory
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.planning import Action, Op
from lightning_superpipe.tiers import Slab

__all__ = ["Residency", "Staging"]


class Staging(NamedTuple):
    """The hops before a copy to the device: units that are cast, and units that lie in files (None: none does)."""

    casts: WireStaging
    fetches: FetchRing | None = None


class Residency:
    """Moves units between the store and the slots.

    Args:
        unbind: takes a unit's twins out of its modules; called before its slot is given away.
        staging: where units that are cast or lie in files wait for their copy.

    Attributes:
        fetches: the way from files; None where no unit lies in one.
        last_copy: end of the newest copy that reads host memory.
        num_loads: copies of a unit to the device.
        num_plan_misses: loads that no plan had asked for, when their unit was needed.
        num_spills: loads that had to take the slot of a unit in the middle of its call.
        num_copied_back: parameters that a forward changed on the device.
        num_stashed: twins that somebody kept beyond their unit's call; they own their memory since.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        slots: SlotPool,
        lanes: Lanes,
        follower: Follower,
        casts: Casts,
        unbind: Callable[[Unit], None],
        staging: Staging,
    ) -> None:
        self._staging, self.fetches = staging.casts, staging.fetches
        self.units, self.slots, self.lanes, self.follower, self._unbind = units, slots, lanes, follower, unbind
        self._casts = casts
        self._traded = slots if isinstance(slots, TradedSlots) else None
        if self.fetches is not None and self._traded is not None:
            self.fetches.on_wanted = self._let_weights_leave
        self.last_copy: Event | None = None
        self.num_loads = self.num_plan_misses = self.num_spills = self.num_copied_back = self.num_stashed = 0
        self._last_slot: dict[int, Slot] = {}

    def resident(self) -> list[int]:
        """Units on the device or on their way, with up-to-date bytes."""
        return [unit.index for unit in self.units if unit.slot is not None and self.is_fresh(unit)]

    def is_fresh(self, unit: Unit) -> bool:
        """Whether a loaded unit still equals the host's bytes. One that computes now may not change under its feet."""
        return unit.num_active > 0 or unit.stamp == unit.current_stamp()

    def drop_stale(self) -> None:
        """Evict every unit whose host bytes have changed since it was loaded."""
        for unit in self.units:
            if unit.slot is not None and not self.is_fresh(unit):
                self.evict(unit)

    def move(self, actions: Iterable[Action], *, needed: Unit | None = None) -> None:
        """Carry out what a plan moves. Where the device does not look as planned, a move is left out."""
        for action in actions:
            unit = self.units[action.unit]
            if action.op is Op.EVICT:
                if unit.slot is not None and not unit.num_active and unit is not needed:
                    self.evict(unit)
            elif unit.slot is None and self.slots.num_free and unit.parameters and unit.is_current():
                self.load(unit)

    def require(self, unit: Unit) -> None:
        """Make sure that a unit is loaded with up-to-date bytes, and let compute wait for its arrival."""
        if unit.slot is not None and not self.is_fresh(unit):
            self.evict(unit)
        if unit.slot is None:
            self.num_plan_misses += 1
            while not self.slots.num_free:
                self._make_room(unit)
            self.load(unit)
        if unit.arrival is not None:
            try:
                self.lanes.compute_waits(unit.arrival, unit.index)
            except TransferError:
                unit.distrust()  # the slot holds nothing: who tries again must load again
                raise
            unit.arrival = None
        self._settle(unit)
        self._casts.fill(unit)

    def _settle(self, unit: Unit) -> None:
        """End an update that has passed; most have, or the copy could not have arrived."""
        pending = unit.pending
        may_go_on = pending is unit.in_slot or (pending is not None and pending.may_be_read_early)
        if pending is not None and (pending.done.query() or not may_go_on):
            unit.settle()

    def may_update_in_slot(self, unit: Unit) -> bool:
        """Whether a unit lies in its slot with up-to-date bytes, and stays there for the time being."""
        return self._is_complete_in_slot(unit) and not self.follower.will_evict(unit.index)

    def _is_complete_in_slot(self, unit: Unit) -> bool:
        return (
            unit.slot is not None
            and unit.arrival is None
            and not unit.num_active
            and not unit.has_own_storage
            and self.is_fresh(unit)
        )

    def _make_room(self, unit: Unit) -> None:
        loaded = [other for other in self.units if other.slot is not None and other is not unit]
        idle = [other for other in loaded if not other.num_active]
        if not idle:  # a unit called by units that fill all slots: its caller is loaded again when it returns
            self.num_spills += 1
            self.evict(loaded[0])
            return
        next_uses = self.follower.next_uses()
        self.evict(max(idle, key=lambda other: next_uses.get(other.index, len(next_uses) + len(self.units) ** 2)))

    def load(self, unit: Unit) -> None:
        """Start copying a unit into a free slot."""
        slot = unit.slot = self.slots.take(unit.index)
        pending, staged = unit.pending, None
        fences = [slot.free_after, None if pending is None else pending.changed]
        with raw_tensors():
            fetched = self.fetches.fetch(unit) if self.fetches is not None and unit.stored is not None else None
            is_traded = fetched is not None and self._takes(unit, slot, fetched)
            self._move_twins(unit, slot)
            host_bytes = None if fetched is None else fetched.bytes
            if fetched is not None:
                fences.append(fetched.ready)
            if unit.is_cast:
                updated = Past() if pending is None else pending.done
                after = updated if fetched is None else fetched.ready
                staged = self._staging.stage(unit, buffer_bytes=self.slots.slot_bytes, after=after, fetched=host_bytes)
                fences.append(staged.ready)
            if is_traded:
                copies = []
            elif staged is None:
                copies = unit.copies_to(slot, host_bytes)
            else:
                copies = [Copy(slot.buffer[: unit.num_bytes], staged.bytes)]
            copies += self._copies_to_stashed(unit, staged)
        passed = [event for event in fences if event is not None]
        label = Label("P", unit.index, unit.name)
        if is_traded:
            self.lanes.hand_over(Lane.H2D, unit.num_bytes, label=label)
        unit.arrival = self.last_copy = self.lanes.h2d(copies, after=passed, label=label)
        if fetched is not None and self.fetches is not None and not is_traded:
            self.fetches.release(unit, fetched, unit.arrival if staged is None else staged.ready)
        if staged is not None:
            staged.hold_until(unit.arrival)
        unit.note_loaded()
        self.num_loads += 1

    def look_ahead(self) -> None:
        """Let units that the plan loads next be read from their files, though no slot is free for them yet."""
        if self.fetches is not None:
            self.fetches.look_ahead(self.units[index] for index in self.follower.next_loads())

    def note_installed(self) -> None:
        """Units have got their slabs, or others."""
        if self.fetches is not None:
            self.fetches.note_sizes(self.units)

    def _copies_to_stashed(self, unit: Unit, staged: Staged | None) -> list[Copy]:
        """What to copy into twins that own their memory; graphs that hold one see a new version, as without us."""
        for index in unit.has_own_storage:
            unit.settle()  # the version says whether graphs may go on
            if unit.parameters[index]._version != unit.host_versions[index]:
                torch.autograd.graph.increment_version(unit.twin(index))
        return [
            Copy(unit.twin(index).data, unit.parameters[index].data if staged is None else staged.views[index])
            for index in sorted(unit.has_own_storage)
        ]

    def _move_twins(self, unit: Unit, slot: Slot) -> None:
        self.forget(unit)
        unit.reclaim_twins()
        self._point_at(unit, slot)

    def _point_at(self, unit: Unit, slot: Slot) -> None:
        unit.point_twins_at(slot)
        slot.num_twins += unit.num_slot_twins()
        self._last_slot[unit.index] = slot

    def _takes(self, unit: Unit, slot: Slot, fetched: Fetched) -> bool:
        """Let the buffer that a unit is read into become its slot's memory, if that is possible."""
        is_whole = not unit.is_cast and not unit.strays()
        if self._traded is None or not is_whole or not self._traded.trade(slot, fetched.buffer.slab):
            return False
        fetched.hold_until(Past())  # the slot's memory was free
        return True

    def _let_weights_leave(self, unit: Unit) -> None:
        """A unit's update begins, and backward needs it no more: its weights leave the slot for that, uncopied."""
        slot, fetches = unit.slot, self.fetches
        if slot is None or fetches is None or self._traded is None or not self._is_complete_in_slot(unit):
            return
        if unit.index not in fetches.awaited:  # its update was not announced
            return
        self._unbind(unit)  # modules hold twins as well
        is_held = slot.has_escaped or unit.twin_versions() != unit.versions or bool(unit.stashed_twins())
        if is_held or unit.pending is not None or unit.is_cast or unit.strays():
            return
        if (buffer := fetches.room_for(unit)) is not None and self.evict(unit, into=buffer.slab):
            fetches.keep(unit, buffer)

    def evict(self, unit: Unit, *, into: Slab | None = None) -> bool:
        """Give a unit's slot back. Nothing is copied, unless a forward has changed weights on the device.

        Args:
            into: gets the slot's memory and what is in it, for its own.

        Returns:
            Whether it has got them.
        """
        slot = unit.slot
        assert slot is not None, f"unit {unit.name!r} is evicted but has no slot"
        if unit.in_slot is not None and unit.arrival is not None:
            with contextlib.suppress(Exception):  # an update that failed tells those who wait for it
                unit.arrival.synchronize()  # its kernels write to the slot (test_slot_is_kept_until_its_update_is_over)
        self._unbind(unit)
        self.copy_back(unit)
        has_been_used = unit.arrival is None
        if has_been_used:
            self.part_with_stashed(unit)
        with raw_tensors():
            if has_been_used and slot.has_escaped:
                self._leave_storage(slot)
            if self._traded is not None:
                self._park(unit, self._traded)
            is_traded = into is not None and self._traded is not None and self._traded.trade(slot, into)
            self.slots.give_back(slot, self.lanes.compute_event)
        unit.slot = unit.arrival = unit.stamp = unit.in_slot = None
        return is_traded

    def _park(self, unit: Unit, traded: TradedSlots) -> None:
        """A unit leaves memory that others will get: none of its twins stays, and nothing is still read into it."""
        if unit.arrival is not None:
            with contextlib.suppress(Exception):  # nobody waits for it any more
                unit.arrival.synchronize()
        self.forget(unit)
        self._point_at(unit, traded.parking)

    def _leave_storage(self, slot: Slot) -> None:
        """A view of the slot is still alive somewhere: its holder keeps the memory, the slot gets another."""
        self.slots.abandon_storage(slot)
        for unit in self.units:
            if self._last_slot.get(unit.index) is slot:
                unit.point_twins_at(slot)

    def shrink(self, num_slots: int) -> None:
        """Keep so many slots and give up the memory of the others; no unit may be in the middle of its call."""
        count = len(self.slots.slots) - num_slots
        loaded = [unit for unit in self.units if unit.slot is not None]
        for unit in loaded[: max(0, count - self.slots.num_free)]:
            self.evict(unit)
        self.fence_host_reads()  # a prefetch that nobody used may still be writing to that memory
        dropped = self.slots.drop(count)
        for unit in self.units:
            if self._last_slot.get(unit.index) in dropped:  # its twins would hold the memory
                with raw_tensors():
                    self._move_twins(unit, self.slots.slots[0])

    def grow_slots(self, slot_bytes: int) -> None:
        """Give all slots new memory of another size; nothing may be loaded."""
        self.fence_host_reads()  # a prefetch that nobody used may still be writing to the old memory
        self.slots.resize(slot_bytes)
        for unit in self.units:
            if (slot := self._last_slot.get(unit.index)) is not None:
                with raw_tensors():
                    unit.point_twins_at(slot)

    def copy_back(self, unit: Unit) -> None:
        """Bring home the parameters that a forward has written to (weight norm, clamping)."""
        for index, (twin, version) in enumerate(zip(unit.twins, unit.versions, strict=False)):
            host = unit.parameters[index]
            if twin is not None and twin._version != version and twin.size() == host.size():
                unit.settle()  # its home may be written still
                with raw_tensors():
                    write_home(host.data, twin.data)
                unit.versions[index] = twin._version
                unit.note_written([index])
                self.num_copied_back += 1

    def part_with_stashed(self, unit: Unit) -> None:
        """Give twins that somebody holds as objects memory of their own: their holder may read them at any time."""
        for index in unit.stashed_twins():
            twin = unit.twin(index)
            with raw_tensors():
                twin.data = twin.data.clone()
            if (slot := self._last_slot.get(unit.index)) is not None:
                slot.num_twins -= 1
            unit.has_own_storage.add(index)
            self.num_stashed += 1

    def forget(self, unit: Unit) -> None:
        """A unit's twins are about to be made anew, or to point elsewhere."""
        if (slot := self._last_slot.pop(unit.index, None)) is not None:
            slot.num_twins -= unit.num_slot_twins()

    def fence_host_reads(self) -> None:
        """Block until no copy reads host memory: the host may be about to write there."""
        if self.last_copy is not None:
            self.last_copy.synchronize()
            self.last_copy = None

    def close(self) -> None:
        """Evict everything; twins in graphs that are still alive keep their shape and hold one element."""
        self._staging.close()
        if self.fetches is not None:
            self.fetches.close()
        for unit in self.units:
            if unit.slot is not None:
                self.copy_back(unit)
            unit.slot = unit.arrival = unit.stamp = None
            for twin in unit.twins:
                if twin is not None:
                    release_memory(twin, twin.size())
            unit.twins = []
        self._last_slot.clear()
        self.slots.close()
