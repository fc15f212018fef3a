"""Copies beside compute, and autograd's own threads: what only a device with queues can get wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.config import Adversary
from lightning_superpipe.engine.host_lane import HostEvent
from lightning_superpipe.engine.lanes import Copy, Label
from lightning_superpipe.engine.stream_lanes import StreamLanes
from lightning_superpipe.errors import TransferError
from lightning_superpipe.observe import Lane
from tests.gpu.host_updates import updates_at_home
from tests.gpu.places import Place, on_both
from tests.gpu.test_parity import case_of, judge
from tests.parity.harness import Window, first_difference, run_case, run_plain, streamed, trainer
from tests.parity.probe import Block, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


class Thin(ProbeModule):
    """Four rows through matrices so large that every copy takes much longer than its unit's compute."""

    width = 64

    def build(self) -> None:
        self.embed = nn.Linear(self.embed.in_features, self.width)
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(6))
        self.head = nn.Linear(self.width, 2)


class Huge(Thin):
    """32 MiB a unit."""

    width = 2048


def thin(place: Place) -> Any:
    return case_of(Huge if place.is_gpu else Thin, [], max_epochs=1)


@on_both
@pytest.mark.parametrize("window", [Window(1, 1), Window(2, 1), Window(3, 2), Window(4, 4)], ids=str)
def test_tiny_compute_beside_huge_copies_loses_no_race(window: Window, place: Place) -> None:
    judge(thin(place), place, window)


@on_both
def test_recording_ends_though_a_copy_in_it_waited_for_work_that_failed(place: Place) -> None:
    lanes, work = StreamLanes(place.device), HostEvent()
    lanes.start_recording()
    copy = Copy(torch.zeros(4, device=place.device), torch.ones(4))
    late = lanes.h2d([copy], after=[work], label=Label("P", 0, "blocks.0"))
    work.error = TransferError("the disk is gone")
    work.set()
    assert lanes.stop_recording().spans() == []
    with pytest.raises(TransferError, match="the disk is gone"):
        late.synchronize()
    lanes.close()


def _without_arrivals(patch: pytest.MonkeyPatch) -> None:
    """Compute does not wait for the copy of its weights; slots are NaN until it lands."""
    patch.setattr(StreamLanes, "compute_waits", lambda self, event, unit: None)


@on_both
def test_without_the_fence_the_same_race_is_lost(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: where copies are queued, it shows that that one can fail.

    Copies behind an update under way are issued later everywhere, so steps end at once here.
    """
    case, strategy = thin(place), SuperpipeStrategy(k=2, k_prime=1, update="at_once", adversary=Adversary())
    with updates_at_home():
        reference = run_plain(case, place.name)
        _without_arrivals(monkeypatch)
        candidate = run_case(case, place.name, strategy)
    is_lost = first_difference(reference, candidate) is not None
    assert is_lost == place.is_gpu, "a device that copies at once has no race to lose"


class Threads(ProbeModule):
    """Notes the threads in which forward and the hooks of backward run."""

    def build(self) -> None:
        self.seen: dict[str, set[int]] = {"forward": set(), "backward": set()}
        for block in self.blocks:
            block.register_forward_hook(lambda *_: self.note("forward"))
            block.register_full_backward_hook(lambda *_: self.note("backward"))

    def note(self, phase: str) -> None:
        if self.training:
            self.seen[phase].add(threading.get_ident())


@on_both
def test_backward_runs_on_autograds_thread_and_is_exact(place: Place) -> None:
    runs: list[Threads] = []
    judge(case_of(Threads, runs, max_epochs=1), place, Window(2, 1))
    main = threading.get_ident()
    for module in runs:
        assert module.seen["forward"] == {main}
        assert module.seen["backward"] and main not in module.seen["backward"]


class TwoThreads(ProbeModule):
    """Each step's backward is called from a thread of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.record_loss(loss)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.manual_backward(loss)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert errors == []
        optimizer.step()


@on_both
def test_backward_may_be_called_from_another_thread(place: Place) -> None:
    judge(case_of(TwoThreads, [], max_epochs=1), place, Window(2, 1))


@on_both
def test_a_second_run_in_the_same_process_is_exact(place: Place) -> None:
    case = thin(place)
    with updates_at_home():
        first, second = (run_case(case, place.name, streamed(Window(2, 1), seed=seed)) for seed in (1, 2))
    assert first_difference(first, second) is None


@pytest.mark.gpu
def test_copies_run_beside_compute() -> None:
    """Where each unit has much to compute, copies of the next are over when it is needed; k' < k is what it takes."""
    from lightning_superpipe import SuperpipeStrategy

    strategy = SuperpipeStrategy(k=3, record_step=3)
    rows = [batch.repeat(4096, 1) for batch in fixed_batches(5)]
    trainer("cuda", strategy, max_epochs=1).fit(Huge(), torch.utils.data.DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    recording = strategy.recording
    assert recording is not None
    compute = [span for span in recording.lane(Lane.COMPUTE) if span.name in "FB"]
    copies = recording.lane(Lane.H2D)
    beside = [copy for copy in copies if any(one.start_s < copy.end_s and copy.start_s < one.end_s for one in compute)]
    assert len(beside) > len(copies) / 2
