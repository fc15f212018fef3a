"""Offload: what autograd saves in a unit's call goes to the host under the next unit, and returns before its backward.

One batch of parcels for each call. A batch is sent when the next call begins, so that what the last unit saved never
travels; its device memory is let go one call later. In backward the batches come back in the opposite order, one ahead.

Where activations live in files, a batch takes one more hop, see :mod:`file_hop`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_superpipe.engine.backend import raw_tensors, storage_address
from lightning_superpipe.engine.file_hop import Arrival, FileHop
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.parcels import HostPool, Parcel
from lightning_superpipe.engine.slots import storage_key
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import TransferError
from lightning_superpipe.tiers import Tier, trim_heap

__all__ = ["MIN_BYTES", "Offload"]

# Below this a copy takes longer to start than to run, and the memory is not worth it.
MIN_BYTES = 32 * 1024
_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "a tensor of shape {shape} that unit {unit!r} saved changed before it was offloaded"
)


class _View(NamedTuple):
    """What autograd keeps instead of a saved tensor."""

    parcel: Parcel
    batch: _Batch
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, device_bytes: Tensor) -> Tensor:
        with raw_tensors():
            made = torch.empty(0, dtype=self.dtype, device=device_bytes.device)
            return made.set_(device_bytes.untyped_storage(), self.offset, self.size, self.stride)


class _Batch:
    """The parcels of one call, held weakly: graphs own them."""

    def __init__(self, unit: Unit, index: int, staying: Container[int]) -> None:
        self.staying = staying
        self.label, self.index = Label("A", unit.index, unit.name), index
        self._parcels: list[weakref.ref[Parcel]] = []

    def add(self, parcel: Parcel) -> None:
        self._parcels.append(weakref.ref(parcel))

    def alive(self) -> list[Parcel]:
        return [parcel for ref in self._parcels if (parcel := ref()) is not None]


class _Transit(NamedTuple):
    """A batch on its way to the host; holds the device's bytes until the copy is done, but no parcel."""

    parcels: list[weakref.ref[Parcel]]
    sources: list[Tensor]
    done: Event


class Offload:
    """The saved activations of units whose policy is to offload.

    Args:
        tier: takes the activations.
        memory: gives buffers on the way to a tier that is not memory.
        staying: returns addresses of storages that must not travel: anchors and buffers are on the device anyway.
    """

    def __init__(self, lanes: Lanes, tier: Tier, memory: Tier, staying: Callable[[], Container[int]]) -> None:
        self._lanes, self._staying = lanes, staying
        self._pool = HostPool(tier)
        self._files = None if tier.is_memory else FileHop(self._pool, memory, lanes)
        self._lock = threading.RLock()
        self._is_open = True
        self._num_batches = 0
        self._to_send: list[_Batch] = []
        self._transits: deque[_Transit] = deque()
        self._batches: dict[int, weakref.ref[_Batch]] = {}
        self._fetched: list[_Batch] = []
        self._arriving: list[tuple[list[Tensor], list[Event]]] = []
        self._by_storage: weakref.WeakValueDictionary[int, Parcel] = weakref.WeakValueDictionary()

    @property
    def num_allocations(self) -> int:
        """Pieces of host memory taken so far; it does not grow once all sizes have been seen."""
        return self._pool.num_allocations

    # -- forward

    @contextlib.contextmanager
    def saving(self, unit: Unit) -> Iterator[None]:
        """Scope of a unit's call whose saved tensors travel."""
        with self._lock:
            self._num_batches += 1
            batch = _Batch(unit, self._num_batches, self._staying())
            self._batches[batch.index] = weakref.ref(batch)
        own = weakref.ref(self)

        def pack(tensor: Tensor) -> Any:
            offload = own()
            return tensor if offload is None else offload._pack(tensor, batch)

        def unpack(packed: Any) -> Tensor:
            return _unpacked(own(), packed) if isinstance(packed, _View) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        batch.staying = ()
        with self._lock:
            self._to_send.append(batch)

    def _pack(self, tensor: Tensor, batch: _Batch) -> Any:
        if not self._travels(tensor, batch.staying):
            return tensor
        with self._lock:
            key = storage_key(tensor)
            parcel = self._by_storage.get(key)
            if parcel is None or not _is_of(parcel, tensor):
                parcel = self._by_storage[key] = Parcel(tensor, self._pool)
                batch.add(parcel)
        return _View(parcel, batch, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _travels(self, tensor: Tensor, staying: Container[int]) -> bool:
        if (
            tensor.device.type != self._lanes.device.type
            or tensor.is_inference()
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return False
        address = storage_address(tensor)
        if address is None or isinstance(tensor, torch.nn.Parameter) or address in staying:
            return False
        return tensor.untyped_storage().nbytes() >= MIN_BYTES

    def boundary(self) -> None:
        """A unit's forward begins: send what the one before saved, let go of what has been sent."""
        with self._lock:
            while len(self._transits) > 1 or (self._transits and self._transits[0].done.query()):
                self._let_go_of_oldest()
            batches, self._to_send = self._to_send, []
            for batch in batches:
                self._send(batch)
            self._note_freed()

    def _send(self, batch: _Batch) -> None:
        parcels = [parcel for parcel in batch.alive() if parcel.place is None]
        if not parcels:
            return
        sources = [parcel.device_bytes for parcel in parcels if parcel.device_bytes is not None]
        assert len(sources) == len(parcels), "what was not sent is on the device"
        if self._files is not None:
            done = self._files.send(parcels, sources, batch.label)
        else:
            done = self._send_to_memory(parcels, sources, batch.label)
        # The device's bytes are held until the copy is done: the allocator may give them to others after that only.
        self._transits.append(_Transit([weakref.ref(parcel) for parcel in parcels], sources, done))

    def _send_to_memory(self, parcels: Sequence[Parcel], sources: Sequence[Tensor], label: Label) -> Event:
        copies, places = [], [self._pool.take(parcel.num_bytes) for parcel in parcels]
        for parcel, place, source in zip(parcels, places, sources, strict=True):
            parcel.place = place
            copies.append(Copy(parcel.host_bytes(), source))
        # What was in that host memory before has been read: compute waited for it, or nobody ever will.
        done = self._lanes.d2h(copies, after=[self._lanes.compute_event()], label=label)
        for parcel, place in zip(parcels, places, strict=True):
            parcel.place = place._replace(last_copy=done)
        return done

    def _let_go_of_oldest(self) -> None:
        transit = self._transits.popleft()
        transit.done.synchronize()
        for ref in transit.parcels:
            if (parcel := ref()) is not None:
                parcel.let_go()

    def _note_freed(self) -> None:
        """Where files stand in for memory, what the heap has between two pieces that are in use is needed elsewhere."""
        if self._files is not None and self._lanes.device.type == "cpu":
            trim_heap()

    # -- backward

    def reached(self, unit: Unit) -> None:
        """Backward reaches a unit; the batches of its last call, and of the one before, are about to be needed."""
        with self._lock:
            batch = next((each for each in self._newest_first() if each.label.unit == unit.index), None)
            if batch is not None:
                self._reach(batch)

    def _newest_first(self) -> Iterator[_Batch]:
        for index in sorted(self._batches, reverse=True):
            batch = self._batches[index]()
            if batch is None or not batch.alive():
                del self._batches[index]
            else:
                yield batch

    def _reach(self, batch: _Batch) -> None:
        self._part_with_done()
        for other in [each for each in self._fetched if each.index > batch.index]:
            for parcel in other.alive():  # a graph that is kept for another pass; this one is over for these
                if parcel.place is not None:
                    parcel.let_go()
            self._fetched.remove(other)
        earlier = [each for each in self._newest_first() if each.index < batch.index][:1]
        for each in (batch, *earlier):
            self._fetch(each)
        self._note_freed()

    def _part_with_done(self) -> None:
        """Hold nothing for copies that are done: what is on the device is the graph's to hold, and needed soon."""
        while self._transits and self._transits[0].done.query():
            self._transits.popleft()
        self._arriving = [each for each in self._arriving if not all(event.query() for event in each[1])]

    def _fetch(self, batch: _Batch) -> None:
        parcels = [parcel for parcel in batch.alive() if parcel.device_bytes is None]
        if not parcels:
            return
        self._part_with_done()  # before anything is allocated
        targets = [_empty(parcel.num_bytes, self._lanes.device) for parcel in parcels]
        if self._files is not None:
            arrivals = self._files.fetch(parcels, targets, batch.label)
        else:
            arrivals = [self._fetch_from_memory(parcels, targets, batch.label)]
        self._arriving.append((targets, [event for _, event in arrivals]))
        for parcel, target in zip(parcels, targets, strict=True):
            parcel.device_bytes = target
        for arrived, event in arrivals:
            for parcel in arrived:
                parcel.arrival = event
        if batch not in self._fetched:
            self._fetched.append(batch)

    def _fetch_from_memory(self, parcels: list[Parcel], targets: Sequence[Tensor], label: Label) -> Arrival:
        # Compute that is still queued may use what that memory was before. The copies home are done: we waited for them
        # before we let go.
        copies = [Copy(target, parcel.host_bytes()) for parcel, target in zip(parcels, targets, strict=True)]
        arrival = self._lanes.h2d(copies, after=[self._lanes.compute_event()], label=label)
        for parcel in parcels:
            assert parcel.place is not None, "the parcel was sent"
            parcel.place = parcel.place._replace(last_copy=arrival)
        return Arrival(parcels, arrival)

    def device_bytes_of(self, view: _View) -> Tensor:
        """The bytes of a parcel on the device, arrived."""
        parcel = view.parcel
        with self._lock:
            if not self._is_open:
                return _from_host(parcel, self._lanes.device)
            if parcel.device_bytes is None:
                self._reach(view.batch)
            if parcel.device_bytes is None:  # the call that saved it first is not in any graph any more
                view.batch.add(parcel)
                self._fetch(view.batch)
            if parcel.arrival is not None:
                self._wait_for(parcel, view.batch.label.unit)
            self._part_with_done()  # so that the graph can free what backward has used while the rest is in use
            assert parcel.device_bytes is not None, "fetched just now"
            return parcel.device_bytes

    def _wait_for(self, parcel: Parcel, unit: int) -> None:
        arrival, parcel.arrival = parcel.arrival, None
        assert arrival is not None, "asked for only where it is under way"
        try:
            self._lanes.compute_waits(arrival, unit)
        except TransferError:
            parcel.let_go()  # nothing has arrived; who comes again tries again
            raise

    # -- the end

    def end_graph(self) -> None:
        """A backward pass is over: what a kept graph fetched goes again."""
        with self._lock:
            for batch in self._fetched:
                for parcel in batch.alive():
                    if parcel.place is not None:
                        parcel.let_go()
            self._fetched.clear()
            self.settle()

    def settle(self) -> None:
        """Wait for all copies under way, and hold nothing for them any more."""
        with self._lock:
            while self._transits:
                self._let_go_of_oldest()
            for _, events in self._arriving:
                for event in events:
                    with contextlib.suppress(TransferError):  # who waits for the bytes is told
                        event.synchronize()
            self._arriving.clear()
            self._to_send.clear()

    def close(self) -> None:
        """Finish copies; graphs that are alive keep their parcels, on the host."""
        with self._lock:
            self._is_open = False
            self._batches.clear()
            self._fetched.clear()
            if self._files is not None:
                self._files.close()
            self._pool.close()


def _is_of(parcel: Parcel, tensor: Tensor) -> bool:
    """Whether a parcel holds what a tensor's storage holds now: storages die, and their addresses return."""
    return parcel.storage() is not None and parcel.version == tensor._version and not parcel.is_lost


def _unpacked(offload: Offload | None, view: _View) -> Tensor:
    parcel = view.parcel
    device_bytes = parcel.device_bytes if offload is None else offload.device_bytes_of(view)
    if device_bytes is None:
        device_bytes = _from_host(parcel, torch.device("cpu"))
    if parcel.was_modified or (parcel.witness is not None and parcel.witness._version != parcel.version):
        raise RuntimeError(_MODIFIED.format(shape=tuple(view.size), unit=view.batch.label.unit_name))
    return view.of(device_bytes)


def _from_host(parcel: Parcel, device: torch.device) -> Tensor:
    """The session is over, and with it the lanes."""
    if parcel.device_bytes is None:
        shares = parcel.place is not None and parcel.place.hold is not None  # views begin at the start of a storage
        parcel.device_bytes = parcel.host_bytes().to(device, copy=shares)
    return parcel.device_bytes


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    """Device memory, made so that those who count operations see it."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
