"""Stepping aside outside Lightning's Trainer: that of transformers does so by itself, other loops when asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lightning_superpipe import (
    Adversary,
    FabricSuperpipeStrategy,
    Link,
    SuperpipeAccelerator,
    SuperpipeTrainer,
    SuperpipeTrainerMixin,
    attach,
)
from tests.engine.tiny import Block
from tests.frontends.story import Story, make_model, texts
from tests.frontends.test_transformers import are_equal, arguments, train

WIDTH, NUM_STEPS, STEP = 16, 10, 6
OPTIONS: Any = {"device_memory": "1MiB", "link": Link(), "adversary": Adversary(max_delay_ms=0.5)}
DATA: Any = [{"input_ids": ids, "labels": ids} for ids in texts(Story(num_steps=16))]
SAID = "on the run goes on as without superpipe"

pytestmark = pytest.mark.filterwarnings("ignore")


class Network(nn.Module):
    """Batch norm, then blocks with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, dropout=0.2) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.norm(x))  # type: ignore[no-any-return]


Backward = Callable[[Tensor], Any]


def loop(
    model: Any, optimizer: Any, backward: Backward = Tensor.backward, *, device: Any = "cpu", parts: int = 2
) -> list[Tensor]:
    """Train on accumulated batches with clipping, and evaluate after each step; return losses and outputs."""
    generator, found = torch.Generator().manual_seed(1), []
    torch.manual_seed(2)
    for _ in range(NUM_STEPS):
        for _ in range(parts):
            x = torch.randn(8, WIDTH, generator=generator).to(device)
            loss = model(x).pow(2).mean()
            backward(loss)
            found.append(loss.detach().cpu())
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found.append(model(x).cpu())
    return found


def adamw(net: Network) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=False)


def ordinary(device: Any = "cpu") -> tuple[list[Tensor], Network]:
    net = Network().to(device)
    return loop(net, adamw(net), device=device), net.cpu()


def plain(step_aside: Any, device: Any = "cpu") -> tuple[list[Tensor], Network, Any]:
    net = Network()
    optimizer = adamw(net)
    link = {} if device == "cpu" else {"link": None}
    with attach(net, optimizer, device=device, step_aside=step_aside, **{**OPTIONS, **link}) as pipe:
        found = loop(net, optimizer, device=device)
        where = {parameter.device.type for parameter in net.parameters()}
        assert where == {torch.device(device).type if step_aside is True else "cpu"}
        report = pipe.report()
    return found, net, report


def fabric(step_aside: Any) -> tuple[list[Tensor], Network, Any]:
    net = Network()
    strategy = FabricSuperpipeStrategy(step_aside=step_aside, **OPTIONS)
    launched = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    model, optimizer = launched.setup(net, adamw(net))
    found = loop(model, optimizer, launched.backward)
    report = strategy.report()
    strategy.teardown()
    return found, net, report


def accelerate(step_aside: Any) -> tuple[list[Tensor], Network, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    net = Network()
    accelerator = SuperpipeAccelerator(superpipe={"step_aside": step_aside, **OPTIONS}, cpu=True)
    model, optimizer = accelerator.prepare(net, adamw(net))
    found, report = loop(model, optimizer, accelerator.backward), accelerator.report_of(net)
    accelerator.free_memory()
    return found, net, report


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("run", [plain, fabric, accelerate])
@pytest.mark.parametrize("step_aside", [True, "auto", False])
def test_loops_of_ones_own_step_aside_when_asked_to(run: Any, step_aside: Any, caplog: Any) -> None:
    wanted, reference = ordinary()
    with caplog.at_level("INFO", logger="lightning_superpipe"):
        found, net, report = run(step_aside)
    assert same(found, wanted)
    assert same(list(net.state_dict().values()), list(reference.state_dict().values()))
    assert (SAID in report.plan) is (step_aside is True)
    assert ("with step_aside=True the run goes on" in caplog.text) is (step_aside == "auto")
    assert {type(module) for module in net.modules()} == {type(module) for module in reference.modules()}


@pytest.mark.emu
def test_a_pipe_brings_everything_home_at_its_end(emu: torch.device) -> None:
    wanted, reference = ordinary(emu)
    found, net, report = plain(True, emu)
    assert same(found, wanted) and SAID in report.plan
    assert same(list(net.state_dict().values()), list(reference.state_dict().values()))
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"cpu"}


def test_a_pipe_that_has_stepped_aside_still_announces_updates() -> None:
    net, reference = Network(), Network()
    optimizer, other = adamw(net), adamw(reference)
    with attach(net, optimizer, device="cpu", step_aside=True, **OPTIONS) as pipe:
        for seed in range(NUM_STEPS):
            torch.manual_seed(seed)
            loss = net(torch.randn(8, WIDTH)).pow(2).mean()
            with pipe.updating(optimizer):
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            torch.manual_seed(seed)
            reference(torch.randn(8, WIDTH)).pow(2).mean().backward()
            other.step()
            other.zero_grad()
        assert SAID in pipe.report().plan
    assert same(list(net.state_dict().values()), list(reference.state_dict().values()))


def test_a_model_that_only_computes_steps_aside() -> None:
    net = Network().eval()
    x = torch.randn(8, WIDTH)
    wanted = net(x).detach()
    with attach(net, device="cpu", step_aside=True, **OPTIONS) as pipe, torch.no_grad():
        for _ in range(NUM_STEPS):
            assert torch.equal(net(x), wanted)
        assert "weights and activations fit on the device" in pipe.report().plan


# -- the Trainer of transformers


def run_trainer(kind: Any, folder: Path, *, own: dict[str, Any] | None = None, **options: Any) -> Any:
    chosen = arguments(folder, max_steps=NUM_STEPS, **options)
    trainer = kind(make_model(Story()), chosen, train_dataset=DATA, eval_dataset=DATA[:2], **own or {})
    return train(trainer), trainer


STREAMED: Any = {"superpipe": {**OPTIONS, "device_memory": "64MiB"}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        {"bf16": True},
    ],
    ids=["plain", "accumulated", "best model", "bf16"],
)
def test_the_trainer_steps_aside_by_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted, reference = run_trainer(Trainer, tmp_path / "ordinary", **options)
    found, trainer = run_trainer(SuperpipeTrainer, tmp_path / "streamed", own=STREAMED, **options)
    assert are_equal(found, wanted)
    assert SAID in trainer.superpipe_report().plan
    assert trainer.evaluate()["eval_loss"] == reference.evaluate()["eval_loss"]


def test_a_trainer_resumes_from_a_checkpoint_of_such_a_run(tmp_path: Path) -> None:
    options = {"save_steps": 8}
    wanted, _ = run_trainer(Trainer, tmp_path / "ordinary", **options)
    run_trainer(SuperpipeTrainer, tmp_path / "streamed", own=STREAMED, **options)
    chosen = arguments(tmp_path / "streamed", max_steps=NUM_STEPS, **options)
    again = SuperpipeTrainer(make_model(Story()), chosen, train_dataset=DATA, **STREAMED)
    again.train(resume_from_checkpoint=str(tmp_path / "streamed" / "checkpoint-8"))
    assert all(map(torch.equal, wanted[1], again.model.parameters()))


def test_callbacks_of_the_users_keep_the_trainer_streaming(tmp_path: Path) -> None:
    class Own(TrainerCallback):  # type: ignore[misc]
        pass

    own = {**STREAMED, "callbacks": [Own()]}
    wanted, _ = run_trainer(Trainer, tmp_path / "ordinary")
    found, trainer = run_trainer(SuperpipeTrainer, tmp_path / "streamed", own=own)
    assert are_equal(found, wanted)
    assert SAID not in trainer.superpipe_report().plan
    assert trainer.superpipe_report().num_steps == NUM_STEPS


class Failing(Trainer):
    """Runs out of memory in the forward of its ninth batch, once."""

    counted = SimpleNamespace(losses=0)  # no number of the Trainer's, which would be put back

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        self.counted.losses += 1
        if self.counted.losses == 9:
            raise torch.OutOfMemoryError("no room")
        return super().compute_loss(*arguments, **options)


class StreamedFailing(SuperpipeTrainerMixin, Failing):
    pass


def test_a_step_without_room_streams_again_and_is_repeated(tmp_path: Path, caplog: Any) -> None:
    wanted, _ = run_trainer(Trainer, tmp_path / "ordinary")
    with caplog.at_level("INFO", logger="lightning_superpipe"):
        found, trainer = run_trainer(StreamedFailing, tmp_path / "streamed", own=STREAMED)
    assert are_equal(found, wanted)
    assert "no room The run streams again and repeats the step." in caplog.text
    assert trainer.superpipe_report().num_steps == NUM_STEPS - 8
