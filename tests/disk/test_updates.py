"""When units from files are updated, what is read for that, what stays in memory, and what a recording shows of it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_superpipe import attach
from lightning_superpipe.config import Link, SuperpipeConfig
from lightning_superpipe.errors import BudgetError
from lightning_superpipe.forecast.preview import preview
from lightning_superpipe.observe.pictures import draw_timeline
from lightning_superpipe.observe.trace import Lane, Recording
from lightning_superpipe.optimizer.bench import Bench
from tests.disk.loops import EVERYTHING, NUM_BLOCKS, WIDTH, Block, Left, Model, left, make, step, train

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 256  # smaller activations stay where they are
ALL_BYTES = 16 * sum(parameter.numel() for parameter in Model().parameters())


def announced(store: Any, *, steps: int = 4, broken_at: int | None = None) -> tuple[Left, list[int]]:
    """Train in a loop that promises to look at no gradient; return what is left, and bytes written before each step."""
    model, optimizer = make()
    losses, early = [], []
    with attach(model, optimizer, device="cpu", k=2, store=store) as pipe:
        for number in range(steps):
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
            loss = model(x).float().pow(2).mean()
            with pipe.updating(optimizer):
                before = pipe.report().total.disk_written_bytes
                loss.backward()
                model.blocks[-1].up.weight.sum()  # who looks waits for the update
                early.append(pipe.report().total.disk_written_bytes - before)
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return left(model, optimizer, losses), early


@pytest.mark.parametrize("store", ["disk", {"weights": "disk"}, {"states": "disk"}])
def test_loop_that_looks_at_no_gradient_updates_in_backward_to_the_same_bits(store: Any) -> None:
    found, early = announced(store)
    assert found.equals(train(None))
    assert early[0] == 0, "the first step makes the states, in the optimizer's own order"
    assert all(early[2:]), "no unit was written before the step was asked for"


def test_what_waits_at_the_end_of_backward_is_read_in_the_order_of_the_next_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch, order, may_go_on = Bench.fetch, [], threading.Event()

    def slow(self: Bench, *args: Any) -> None:
        order.append(self.unit.index)
        may_go_on.wait(60)
        fetch(self, *args)

    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk") as pipe:
        for number in range(3):
            loss = model(torch.full((4, WIDTH), float(number))).pow(2).mean()
            if number == 2:
                left(model, optimizer)  # nothing is under way
                may_go_on.clear()
                monkeypatch.setattr(Bench, "fetch", slow)
            with pipe.updating(optimizer):
                loss.backward()
                may_go_on.set()
                optimizer.step()
            optimizer.zero_grad()
        left(model, optimizer)
    # The first is what waits when the reading thread wakes up; all others wait by then.
    assert sorted(order) == list(range(NUM_BLOCKS))
    assert order[1:] == sorted(order[1:])


def test_weights_that_an_update_has_left_in_memory_are_not_read_again() -> None:
    read = {}
    for update in ("at_once", "after_backward"):
        model, optimizer = make()
        with attach(model, optimizer, device="cpu", k=2, store="disk", update=update) as pipe:
            for number in range(4):
                step(model, optimizer, number)
            pipe.report()
            model(torch.ones(4, WIDTH))
            read[update] = pipe.report().total.disk_read_bytes
        optimizer.zero_grad()
    assert read["after_backward"] < read["at_once"]


def reads_for_updates(recording: Recording) -> int:
    return sum(span.num_bytes for span in recording.lane(Lane.READ) if span.name == "U")


@pytest.mark.parametrize("link", [None, Link()], ids=["one memory", "copied"])
def test_weights_that_backward_has_read_are_not_read_again_for_their_update(link: Link | None) -> None:
    model, optimizer = make()
    weights = -(-sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters()) // 4096) * 4096
    states = -(-2 * sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters()) // 4096) * 4096
    options: dict[str, Any] = {"store": "disk", "disk": {"ring": NUM_BLOCKS}}  # has room for all
    with attach(model, optimizer, device="cpu", k=2, link=link, record_step=3, **options) as pipe:
        losses = []
        for number in range(5):
            losses.append(step(model, optimizer, number, announced_by=pipe))
            left(model, optimizer)  # nothing of it runs on under the next step
        recording = pipe.recording
    assert left(model, optimizer, losses).equals(train(None, steps=5))
    assert recording is not None
    num_again = 0 if link is None else 2  # those that stay in slots at the turn: only copies of theirs were kept
    assert reads_for_updates(recording) == NUM_BLOCKS * states + num_again * weights


def test_weights_that_change_while_they_are_kept_are_read_again() -> None:
    """A promise about gradients says nothing of weights: here a hook of the user's changes some in backward."""

    def run(store: Any) -> Left:
        model, optimizer = make()
        bias = model.blocks[2].up.bias  # which backward does not need

        def halve(_: torch.Tensor) -> None:
            with torch.no_grad():
                bias.mul_(0.5)

        model.blocks[2].register_forward_hook(lambda *all_of_it: all_of_it[-1].register_hook(halve) and None)
        options = {"device": "cpu", "k": 2, "store": store, "disk": {"ring": NUM_BLOCKS}}
        with contextlib.nullcontext() if store is None else attach(model, optimizer, **options) as pipe:
            losses = [step(model, optimizer, number, announced_by=pipe) for number in range(4)]
        return left(model, optimizer, losses)

    assert run("disk").equals(run(None))


# -- what stays in memory


def test_units_that_host_memory_holds_stay_there_and_are_not_written() -> None:
    options = {"device": "cpu", "k": 2, "store": "disk", "update": "at_once"}
    written = []
    for limit in (None, ALL_BYTES * 2):
        model, optimizer = make()
        with attach(model, optimizer, **options, host_memory=limit) as pipe:
            losses = [step(model, optimizer, number) for number in range(4)]
            report = pipe.report()
        written.append(report.last_step.disk_written_bytes)
        assert left(model, optimizer, losses).equals(train(None))
        assert ("no unit stays" in str(report)) == (limit is None)
    assert 0 < written[1] < written[0]


def test_disk_is_taken_before_training_and_only_for_units_that_lie_there(monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken = os.posix_fallocate, []

    def counted(descriptor: int, offset: int, num_bytes: int) -> None:
        taken.append(num_bytes)
        take(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", counted)
    in_files, reserved, later = [], [], []
    for limit in (None, ALL_BYTES * 2):
        taken.clear()
        model, optimizer = make()
        with attach(model, optimizer, device="cpu", k=2, store="disk", host_memory=limit) as pipe:
            reserved.append(sum(taken))
            for number in range(3):
                step(model, optimizer, number)
            later.append(sum(taken) - reserved[-1])
            stay = re.search(r"(\d+) of \d units stay", str(pipe.report()))
            in_files.append(NUM_BLOCKS - (int(stay[1]) if stay else 0))
    unit = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    room = [2 * 3 * unit * count for count in in_files]  # weights and two states, and as much to undo a step
    assert in_files[1] < in_files[0]
    assert all(least <= found <= 1.1 * least for least, found in zip(room, reserved, strict=True))
    assert all(more <= 0.05 * found for more, found in zip(later, reserved, strict=True)), "but for whole pages"


def test_host_memory_is_kept_whatever_stays_there() -> None:
    least = None
    for percent in range(100, 20, -5):
        model, optimizer = make()
        limit = ALL_BYTES * 2 * percent // 100
        try:
            with attach(model, optimizer, device="cpu", k=1, store=EVERYTHING, host_memory=limit) as pipe:
                step(model, optimizer, 0)
                step(model, optimizer, 1)
                assert pipe.report().host.total <= limit
            least = limit
        except BudgetError as error:
            assert "host_memory allows" in str(error)
            break
    assert least is not None
    assert least < ALL_BYTES


def test_plan_says_what_stays_in_memory_and_what_files_cost() -> None:
    few = str(preview(Model(), SuperpipeConfig(k=2, store="disk")))
    assert "ring of 3 buffers; no unit stays in host memory" in few
    many = preview(Model(), SuperpipeConfig(k=2, store="disk", host_memory=2 * ALL_BYTES))
    assert many.files is not None
    assert 0 < len(many.files.in_memory) < NUM_BLOCKS
    assert f"{len(many.files.in_memory)} of {NUM_BLOCKS} units stay in host memory" in str(many)
    assert "come on top" not in few
    assert "activations that go there come on top" in str(preview(Model(), SuperpipeConfig(k=2, store=EVERYTHING)))
    gradients = preview(Model(), SuperpipeConfig(k=2, store={"gradients": "disk"})).disk
    assert gradients is not None
    assert (gradients.read_bytes, gradients.written_bytes > 0) == (0, True)


# -- what is counted and recorded


@pytest.mark.parametrize(("kind", "activations"), [("gradients", "keep"), ("activations", "offload")])
def test_what_goes_through_mappings_counts_as_written(kind: str, activations: str) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store={kind: "disk"}, activations=activations) as pipe:
        for _ in range(2):
            model(torch.ones(ROWS, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model(torch.ones(4, WIDTH))  # closes the books of the step before
        written = pipe.report().last_step.disk_written_bytes
    if kind == "gradients":
        assert written == sum(parameter.nbytes for block in model.blocks for parameter in block.parameters())
    else:
        assert written >= (NUM_BLOCKS - 1) * ROWS * 2 * WIDTH * 4  # of all but the last block


def test_recording_shows_reads_and_writes_on_lanes_of_their_own(tmp_path: Path) -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk", update="at_once", record_step=2) as pipe:
        for number in range(4):
            step(model, optimizer, number)
        recording = pipe.recording
    assert recording is not None
    assert recording.lanes == tuple(Lane)
    states = -(-2 * sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters()) // 4096) * 4096
    assert sum(span.num_bytes for span in recording.lane(Lane.WRITE)) > NUM_BLOCKS * states
    assert {span.name for span in recording.lane(Lane.READ)} == {"P", "U"}
    assert {span.unit for span in recording.lane(Lane.WRITE)} == set(range(NUM_BLOCKS))
    names = [
        event["args"]["name"]
        for event in recording.to_chrome_trace()["traceEvents"]
        if event["ph"] == "M" and "name" in event["args"]
    ]
    assert {"read", "write"} <= set(names)
    draw_timeline(recording, tmp_path / "line.svg")
    assert "six lanes" in (tmp_path / "line.svg").read_text()


def test_recording_without_files_has_no_lanes_for_them() -> None:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, record_step=1) as pipe:
        for number in range(3):
            step(model, optimizer, number)
        recording = pipe.recording
    assert recording is not None
    assert recording.lanes == (Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.HOST)


def test_masters_of_units_in_memory_leave_the_bits_that_they_leave_without_files() -> None:
    found = []
    for options in ({"store": "host"}, {"store": "disk", "host_memory": ALL_BYTES}):
        model, optimizer = make(dtype=torch.bfloat16)
        with attach(model, optimizer, device="cpu", k=2, master_weights="float32", **options) as pipe:
            losses = [step(model, optimizer, number) for number in range(4)]
            report = str(pipe.report())
        found.append(left(model, optimizer, losses))
    assert found[0].equals(found[1])
    assert f"of {NUM_BLOCKS} units stay in host memory" in report
    assert "no unit stays" not in report


# -- parameters that leave their unit


class Reader(nn.Module):
    """Reads a matrix of one of its blocks, which therefore leaves its unit; calls that block only sometimes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.skips: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if index not in self.skips:
                x = block(x)
        return x * self.blocks[1].down.weight.mean().tanh()


@pytest.mark.parametrize("rest", ["has no states", "is mostly frozen"])
@pytest.mark.parametrize("update", ["at_once", "after_backward"])
def test_states_of_a_parameter_that_has_left_its_unit_are_not_written_with_it(rest: str, update: str) -> None:
    def run(store: Any) -> Left:
        torch.manual_seed(0)
        model = Reader()
        if rest == "is mostly frozen":
            model.blocks[1].up.requires_grad_(False)
        else:
            model.skips = {1}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
        late = {"max_delay_ms": 10.0}  # between a unit's read and its write, the rest of the step has run
        options = {"device": "cpu", "k": 1, "update": update, "store": store, "adversary": late}
        losses = []
        with contextlib.nullcontext() if store is None else attach(model, optimizer, **options):
            for number in range(6):
                if number == 3:
                    model.skips = set()
                losses.append(step(model, optimizer, number))
        return left(model, optimizer, losses)

    assert run({"states": "disk"}).equals(run(None))
