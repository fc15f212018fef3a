"""Lanes of a device that computes asynchronously, run by hand in the worst order that the fences allow.

On the CPU compute is done when a call returns, so fences that hold copies back until compute is done cannot be missed
there. Here every operation of a step is only queued, as on a GPU: compute, host-to-device and device-to-host are three
queues of one program order each, and nothing but events orders them. The queues run when somebody blocks on an event,
and as far as that event needs; which lane goes first is the adversary's choice. No thread, no sleep, no chance.

As on a GPU, a queue holds no memory: a copy whose source has been freed meanwhile brings garbage.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes, Mark
from lightning_superpipe.engine.slots import SlotPool
from lightning_superpipe.observe.trace import Lane, Recorder

__all__ = ["LANE_ORDERS", "LaneOrder", "LateCompute", "LateLanes"]

LaneOrder = tuple[Lane, Lane, Lane]
LANE_ORDERS: tuple[LaneOrder, ...] = (
    (Lane.COMPUTE, Lane.H2D, Lane.D2H),
    (Lane.COMPUTE, Lane.D2H, Lane.H2D),
    (Lane.H2D, Lane.COMPUTE, Lane.D2H),
    (Lane.H2D, Lane.D2H, Lane.COMPUTE),
    (Lane.D2H, Lane.COMPUTE, Lane.H2D),
    (Lane.D2H, Lane.H2D, Lane.COMPUTE),
)


class LateEvent:
    """A point in a queue."""

    def __init__(self, lanes: LateLanes) -> None:
        self._lanes = lanes
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self._lanes.run_until(self)


class _Operation(NamedTuple):
    run: Callable[[], None]
    after: Sequence[Event]
    done: LateEvent


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, without holding its memory."""

    address: int
    num_bytes: int
    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return cls(storage.data_ptr(), storage.nbytes(), weak, tensor.dtype, size, stride, offset)

    @property
    def is_freed(self) -> bool:
        return bool(self.storage.expired())  # type: ignore[no-untyped-call]

    def tensor(self) -> Tensor:
        """The memory as a tensor; NaN bytes if it has been freed, for it may be anybody's by now."""
        if not self.num_bytes or self.is_freed:
            garbage = torch.full((self.size.numel() * self.dtype.itemsize,), 255, dtype=torch.uint8)
            return garbage.view(self.dtype).view(self.size)
        memory = (ctypes.c_uint8 * self.num_bytes).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.size, self.stride, self.offset)


class LateLanes(Lanes):
    """Three queues and an adversary.

    Args:
        order: which lane goes first when several could; a number draws a lane at random each time.

    Attributes:
        stray_writes: copies whose target had been freed before they ran.
    """

    def __init__(self, device: torch.device, order: LaneOrder | int) -> None:
        super().__init__(device)
        self._queues: dict[Lane, deque[_Operation]] = {lane: deque() for lane in LANE_ORDERS[0]}
        self._order: Sequence[Lane] = LANE_ORDERS[0] if isinstance(order, int) else order
        self._rng = random.Random(order) if isinstance(order, int) else None
        self._lock = threading.RLock()
        self._program_waits = threading.Event()
        self.stray_writes: list[Label] = []

    # -- what the engine calls

    def _queue(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Event], label: Label) -> Event:
        places = [(_Place.of(copy.target), _Place.of(copy.source)) for copy in copies]

        def run() -> None:
            for target, source in places:
                if target.is_freed:
                    self.stray_writes.append(label)
                else:
                    target.tensor().copy_(source.tensor())

        return self.submit(lane, run, after)

    def compute_event(self) -> Event:
        return self.submit(Lane.COMPUTE, lambda: None, ())

    def compute_waits(self, event: Event, unit: int) -> None:
        self.submit(Lane.COMPUTE, lambda: None, (event,))

    def mark(self) -> Mark:
        return 0.0

    def compute_span(self, name: str, unit: int, start: Mark) -> None:
        pass

    def start_recording(self) -> None:
        self.recorder = Recorder()

    def stop_recording(self) -> Recorder:
        recorder, self.recorder = self.recorder, None
        assert recorder is not None
        return recorder

    @property
    def stall_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self._program_waits.set()
        self.finish()

    # -- the device

    def submit(self, lane: Lane, run: Callable[[], None], after: Sequence[Event]) -> LateEvent:
        """Queue an operation that runs once all events have passed."""
        with self._lock:
            done = LateEvent(self)
            self._queues[lane].append(_Operation(run, tuple(after), done))
            return done

    def run_until(self, event: LateEvent) -> None:
        """Run operations until the event has passed.

        The engine's own thread runs nothing while the program goes on: that would make lateness a matter of chance.
        """
        if threading.current_thread() is not threading.main_thread():
            assert self._program_waits.wait(timeout=60), "the program never waits for its gradients"
        with self._lock, _disable_current_modes(), torch.no_grad():
            while not event.has_passed:
                self._run_one()

    def _run_one(self) -> None:
        ready = [lane for lane in self._order if self._queues[lane] and _may_run(self._queues[lane][0])]
        assert ready, "every lane waits for another: the events form a cycle"
        lane = self._rng.choice(ready) if self._rng else ready[0]
        operation = self._queues[lane].popleft()
        operation.run()
        done = operation.done
        del operation  # what it holds is free before anybody hears that it is done
        done.has_passed = True

    def finish(self) -> None:
        """Run all that is queued."""
        for queue in self._queues.values():
            while queue:
                self.run_until(queue[-1].done)

    def attend(self, gradients: GradientReturn) -> None:
        """Learn when the program waits for the engine's own thread."""
        wait = gradients._host.wait

        def waiting(until: Callable[[], bool] | None = None) -> None:
            self._program_waits.set()
            try:
                wait(until)
            finally:
                self._program_waits.clear()

        gradients._host.wait = waiting  # type: ignore[method-assign]


def _may_run(operation: _Operation) -> bool:
    return all(event.query() for event in operation.after)


class LateCompute(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Queues every operation inside on the compute lane instead of running it; reading a number waits for it.

    Operands are held until then, as a stream-ordered allocator would, but for those in slots: a slot is given to the
    next unit while kernels that read it are still queued.
    """

    def __init__(self, lanes: LateLanes, slots: SlotPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lanes, self._slots = lanes, slots

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self._lanes.compute_event().synchronize()
            return func(*args, **kwargs)
        if func.is_view or func in (torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default):
            return func(*args, **kwargs)
        kept = tree_map_only(Tensor, self._kept, (args, kwargs))
        if func._schema.is_mutable:  # in place, on its first operand
            self._lanes.submit(Lane.COMPUTE, lambda: func(*_found(kept[0]), **_found(kept[1])), ())
            return args[0]
        on_meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        outputs = tree_map_only(Tensor, _empty, func(*on_meta[0], **on_meta[1]))
        targets = [output.detach() for output in _tensors(outputs)]

        def run() -> None:
            for target, result in zip(targets, _tensors(func(*_found(kept[0]), **_found(kept[1]))), strict=True):
                target.copy_(result)

        self._lanes.submit(Lane.COMPUTE, run, ())
        return outputs

    def _kept(self, tensor: Tensor) -> _Place | Tensor:
        return tensor.detach() if self._slots.of(tensor) is None else _Place.of(tensor)


def _found(values: Any) -> Any:
    return tree_map_only(_Place, _Place.tensor, values)


def _empty(shape: Tensor) -> Tensor:
    return torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)


def _tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [value for value in values if isinstance(value, Tensor)]
