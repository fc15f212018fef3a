"""Copy lanes and the host lane: order, events, errors, the emulated link, what they keep alive."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from lightning_superpipe.config import Link
from lightning_superpipe.engine.host_lane import HostLane
from lightning_superpipe.engine.lanes import Copy, Label
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe.trace import Lane
from tests.engine.tiny import CPU

LABEL = Label("P", 3, "net.h.3")
GRADIENT = Label("G", 3, "net.h.3")


def superpipe_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("superpipe"))


@pytest.fixture
def lanes() -> Iterator[ThreadLanes]:
    lanes = ThreadLanes(CPU, None)
    yield lanes
    lanes.close()


class Gate:
    """An event that the test lets pass."""

    def __init__(self) -> None:
        self._passed = threading.Event()

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        assert self._passed.wait(60)

    def open(self) -> None:
        self._passed.set()


def copy_of(value: float, size: int = 4) -> Copy:
    return Copy(torch.zeros(size), torch.full((size,), float(value)))


# -- copies


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_copies_bytes_of_any_kind_and_layout(lanes: ThreadLanes, dtype: torch.dtype) -> None:
    source = torch.randint(0, 2, (6, 4)).to(dtype).t()
    target = torch.zeros(6, 4, dtype=dtype).t()
    lanes.h2d([Copy(target, source)], after=(), label=LABEL).synchronize()
    assert torch.equal(target, source)


def test_copy_waits_for_every_event_it_comes_after(lanes: ThreadLanes) -> None:
    first, second, copy = Gate(), Gate(), copy_of(1)
    done = lanes.h2d([copy], after=[first, second], label=LABEL)
    first.open()
    assert not done.query()
    assert copy.target.sum() == 0
    second.open()
    done.synchronize()
    assert done.query()
    assert torch.equal(*copy)


def test_copies_of_a_lane_run_in_order_and_lanes_run_side_by_side(lanes: ThreadLanes) -> None:
    gate = Gate()
    target = torch.zeros(4)
    held = lanes.h2d([Copy(target, torch.ones(4))], after=[gate], label=LABEL)
    last = lanes.h2d([Copy(target, torch.full((4,), 2.0))], after=(), label=LABEL)
    lanes.d2h([copy_of(1)], after=(), label=GRADIENT).synchronize()  # the other lane is not held up
    assert not held.query()
    assert not last.query()
    gate.open()
    last.synchronize()
    assert torch.equal(target, torch.full((4,), 2.0))


def test_bytes_are_counted_by_direction(lanes: ThreadLanes) -> None:
    lanes.h2d([copy_of(1, 4), copy_of(1, 2)], after=(), label=LABEL)
    lanes.d2h([copy_of(1, 8)], after=(), label=GRADIENT)
    assert (lanes.h2d_bytes, lanes.d2h_bytes) == (24, 32)


def test_compute_waits_for_an_arrival_and_the_wait_is_a_stall(lanes: ThreadLanes) -> None:
    gate, copy = Gate(), copy_of(1)
    done = lanes.h2d([copy], after=[gate], label=LABEL)
    timer = threading.Timer(0.02, gate.open)
    timer.start()
    lanes.compute_waits(done, 3)
    assert torch.equal(*copy)
    assert lanes.stall_seconds >= 0.01
    stalled = lanes.stall_seconds
    lanes.compute_waits(done, 3)  # it has arrived: no stall
    assert lanes.stall_seconds == stalled
    timer.join()


# -- errors


def test_failed_copy_reaches_whoever_waits_and_names_the_unit(lanes: ThreadLanes) -> None:
    done = lanes.h2d([Copy(torch.zeros(3), torch.zeros(4))], after=(), label=LABEL)
    with pytest.raises(TransferError, match=r"P.*'net\.h\.3'"):
        done.synchronize()
    assert done.query(), "a failed copy is over"
    with pytest.raises(TransferError, match=r"net\.h\.3"):
        lanes.compute_waits(done, 3)


def test_lane_goes_on_after_a_failed_copy(lanes: ThreadLanes) -> None:
    lanes.h2d([Copy(torch.zeros(3), torch.zeros(4))], after=(), label=LABEL)
    copy = copy_of(1)
    lanes.h2d([copy], after=(), label=LABEL).synchronize()
    assert torch.equal(*copy)


def test_recording_of_a_failed_copy_ends_as_any_other(lanes: ThreadLanes) -> None:
    lanes.start_recording()
    lanes.h2d([copy_of(1)], after=(), label=LABEL)
    failed = lanes.h2d([Copy(torch.zeros(3), torch.zeros(4))], after=(), label=LABEL)
    assert len(lanes.stop_recording().spans()) == 1, "who records is not told of it, and gets what went well"
    with pytest.raises(TransferError):
        failed.synchronize()


def test_copy_after_a_failed_one_fails_too(lanes: ThreadLanes) -> None:
    failed = lanes.h2d([Copy(torch.zeros(3), torch.zeros(4))], after=(), label=LABEL)
    copy = copy_of(1)
    with pytest.raises(TransferError):
        lanes.d2h([copy], after=[failed], label=GRADIENT).synchronize()
    assert copy.target.sum() == 0


# -- the emulated link


@pytest.mark.parametrize("lane", [Lane.H2D, Lane.D2H], ids=str)
def test_link_takes_at_least_bytes_over_bandwidth(lane: Lane) -> None:
    copy = copy_of(1, 250_000)  # a megabyte
    lanes = ThreadLanes(CPU, Link(h2d_gb_s=0.05, d2h_gb_s=0.025, latency_ms=1.0))
    issue = lanes.h2d if lane is Lane.H2D else lanes.d2h
    start = time.perf_counter()
    issue([copy], after=(), label=LABEL).synchronize()
    elapsed = time.perf_counter() - start
    lanes.close()
    assert elapsed >= (0.021 if lane is Lane.H2D else 0.041)


def test_link_without_bandwidth_has_only_its_latency() -> None:
    lanes = ThreadLanes(CPU, Link(latency_ms=5.0))
    start = time.perf_counter()
    lanes.h2d([copy_of(1)], after=(), label=LABEL).synchronize()
    assert time.perf_counter() - start >= 0.005
    lanes.close()


# -- recording


def test_recording_has_every_copy_that_was_queued_and_none_before(lanes: ThreadLanes) -> None:
    lanes.h2d([copy_of(1)], after=(), label=Label("P", 0, "before")).synchronize()
    lanes.start_recording()
    gate = Gate()
    lanes.h2d([copy_of(1)], after=[gate], label=LABEL)
    lanes.d2h([copy_of(1)], after=[gate], label=GRADIENT)
    lanes.compute_span("F", 3, lanes.mark())
    threading.Timer(0.05, gate.open).start()  # while it waits for them
    options = {"unit_names": ["u"] * 4, "k": 2, "k_prime": 1, "device": "cpu", "emulated": True}
    recording = lanes.stop_recording().finish(**options, resident_bytes=0, budget_bytes=None)  # type: ignore[arg-type]
    spans = {(span.lane, span.name, span.unit, span.num_bytes) for span in recording.spans}
    assert spans == {(Lane.H2D, "P", 3, 16), (Lane.D2H, "G", 3, 16), (Lane.COMPUTE, "F", 3, 0)}
    assert all(span.start_s <= span.end_s for span in recording.spans)
    assert lanes.recorder is None


# -- threads and memory


def test_threads_start_with_the_first_copy_and_end_at_close() -> None:
    before = superpipe_threads()
    lanes = ThreadLanes(CPU, None)
    assert superpipe_threads() == before
    copies = [copy_of(1) for _ in range(20)]
    for copy in copies:
        lanes.h2d([copy], after=(), label=LABEL)
    lanes.d2h([copy_of(1)], after=(), label=GRADIENT)
    assert len(superpipe_threads()) == len(before) + 2
    lanes.close()
    assert superpipe_threads() == before
    assert all(torch.equal(*copy) for copy in copies), "close finishes what is queued"
    lanes.close()  # once more does no harm


def test_waiting_threads_keep_no_tensor_alive(lanes: ThreadLanes) -> None:
    copy = copy_of(1)
    kept = [weakref.ref(tensor) for tensor in copy]
    done = lanes.h2d([copy], after=(), label=LABEL)
    del copy
    done.synchronize()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


# -- the host lane


@pytest.fixture
def host() -> Iterator[HostLane]:
    host = HostLane()
    yield host
    host.close()


def test_host_jobs_run_in_order_each_after_its_event(host: HostLane) -> None:
    gate, done = Gate(), []
    host.submit(lambda: done.append(1), after=gate)
    passed = Gate()
    passed.open()
    host.submit(lambda: done.append(2), after=passed)
    assert done == []
    gate.open()
    host.wait()
    assert done == [1, 2]


def test_wait_ends_when_its_condition_holds(host: HostLane) -> None:
    gate, passed, done = Gate(), Gate(), []
    passed.open()
    host.submit(lambda: done.append(1), after=passed)
    host.submit(lambda: done.append(2), after=gate)
    host.wait(lambda: done == [1])
    assert done == [1]
    gate.open()


def test_what_a_host_job_raises_reaches_the_next_wait_once(host: HostLane) -> None:
    passed, done = Gate(), []
    passed.open()

    def fail() -> None:
        raise ValueError("first")

    host.submit(fail, after=passed)
    host.submit(lambda: done.append(1), after=passed)
    with pytest.raises(ValueError, match="first"):
        host.wait()
    assert done == [1], "later jobs run all the same"
    host.wait()


def test_failed_copy_reaches_the_wait_of_the_host_lane(lanes: ThreadLanes, host: HostLane) -> None:
    done = lanes.d2h([Copy(torch.zeros(3), torch.zeros(4))], after=(), label=GRADIENT)
    host.submit(lambda: pytest.fail("the job of a failed copy must not run"), after=done)
    with pytest.raises(TransferError, match=r"net\.h\.3"):
        host.wait()


def test_closing_the_host_lane_finishes_its_jobs_and_ends_its_thread() -> None:
    before, host, passed, done = superpipe_threads(), HostLane(), Gate(), []
    host.close()  # nothing has run
    passed.open()
    host.submit(lambda: done.append(1), after=passed)
    host.close()
    assert done == [1]
    assert superpipe_threads() == before
    host.submit(lambda: done.append(2), after=passed)  # a lane may be used again
    host.wait()
    host.close()
    assert done == [1, 2]


def test_host_thread_keeps_no_job_alive(host: HostLane) -> None:
    passed, tensor = Gate(), torch.zeros(4)
    passed.open()
    kept = weakref.ref(tensor)
    host.submit(partial(_drop, tensor), after=passed)
    del tensor
    host.wait()
    gc.collect()
    assert kept() is None


def _drop(tensor: torch.Tensor) -> None:
    del tensor
