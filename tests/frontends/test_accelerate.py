"""Accelerate: order of ``prepare``, several models, ``enable``, the launcher, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from lightning_superpipe import SuperpipeAccelerator, attach, enable
from lightning_superpipe.errors import ConfigError, SuperpipeError, UnsupportedError

WIDTH = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_superpipe.errors.SuperpipeWarning"),
    pytest.mark.usefixtures("fresh_accelerate"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(3):
        accelerator.backward(model(torch.randn(4, WIDTH)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.parameters()]


def weights(accelerator: Accelerator, *, model_first: bool = True) -> list[Tensor]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    objects = (model, optimizer) if model_first else (optimizer, model)
    prepared = accelerator.prepare(*objects)
    model, optimizer = prepared if model_first else reversed(prepared)
    return train(accelerator, model, optimizer)


@pytest.mark.parametrize("model_first", [True, False])
def test_objects_are_prepared_in_any_order(model_first: bool) -> None:
    expected = weights(Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = SuperpipeAccelerator(cpu=True, superpipe={"k": 2})
    assert all(map(torch.equal, weights(accelerator, model_first=model_first), expected))
    assert accelerator.report().last_step.num_loads == 2 * 4 - 2
    assert len(accelerator.units()) == accelerator.report().num_units == 4


def test_each_model_has_its_own_report() -> None:
    accelerator = SuperpipeAccelerator(cpu=True, superpipe={"k": 1})
    one, other = accelerator.prepare(network(), network())
    one(torch.ones(1, WIDTH))
    assert accelerator.report(0).num_loads == 4
    assert accelerator.report(1).num_loads == 0
    with pytest.raises(SuperpipeError, match="2 were prepared"):
        accelerator.report(2)
    assert other is not one


def test_several_models_and_optimizers_train_in_one_loop() -> None:
    """A generator and its critic, prepared together, each with updates of its own."""

    def losses(kind: Any, **own: Any) -> list[Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = kind(cpu=True, **own)
        models = [network(), network()]
        steps = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
        one, step_of_one, other, step_of_other = accelerator.prepare(models[0], steps[0], models[1], steps[1])
        torch.manual_seed(1)
        found = []
        for _ in range(3):
            made = one(torch.randn(4, WIDTH))
            for is_critics, step in ((True, step_of_other), (False, step_of_one)):
                loss = other(made.detach()).pow(2).mean() if is_critics else -other(made).mean()
                accelerator.backward(loss)
                step.step()
                step_of_one.zero_grad()
                step_of_other.zero_grad()
                found.append(loss.detach())
        return found + [weight.detach().clone() for model in models for weight in model.parameters()]

    assert all(map(torch.equal, losses(SuperpipeAccelerator, superpipe={"k": 2}), losses(Accelerator)))


def test_model_comes_back_without_a_wrapper_and_free_memory_gives_it_back() -> None:
    accelerator = SuperpipeAccelerator(cpu=True)
    model = network()
    assert accelerator.prepare(model) is model
    assert accelerator.unwrap_model(model) is model
    assert accelerator.prepare(model) is model
    assert type(model) is not nn.Sequential
    accelerator.free_memory()
    assert type(model) is nn.Sequential


def test_existing_accelerator_is_enabled() -> None:
    class Own(Accelerator):
        def backward(self, loss: Tensor, **options: Any) -> None:
            self.num_backward = getattr(self, "num_backward", 0) + 1
            super().backward(loss, **options)

    accelerator = Own(cpu=True)
    assert enable(accelerator, {"k": 1}) is accelerator
    weights(accelerator)
    assert accelerator.num_backward == 3
    assert accelerator.report().k == 1


def test_enabling_after_prepare_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(network())
    with pytest.raises(SuperpipeError, match="before prepare"):
        enable(accelerator)


def test_unknown_option_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="did you mean 'k'"):
        SuperpipeAccelerator(cpu=True, superpipe={"kk": 2})


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_other_ways_to_distribute_are_refused(kind: DistributedType) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(UnsupportedError, match=f"{kind.value}.*num_processes 1"):
        enable(accelerator)


@pytest.mark.parametrize("name", ["deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin"])
def test_plugins_that_shard_are_refused_by_name(name: str) -> None:
    """Also in one process, where Accelerate would drop them."""
    with pytest.raises(UnsupportedError, match=f"leave {name} out"):
        SuperpipeAccelerator(cpu=True, **{name: FullyShardedDataParallelPlugin()})


@pytest.mark.parametrize("part", [False, True], ids=["the model", "a part of it"])
def test_a_model_that_streams_already_is_refused_until_it_is_given_back(part: bool) -> None:
    model = network()
    with attach(model[0] if part else model, k=1, units=["0"], device="cpu"):
        with pytest.raises(UnsupportedError, match=r"streams already.*pipe\.close"):
            SuperpipeAccelerator(cpu=True).prepare(model)
        with pytest.raises(UnsupportedError, match="streams already"):
            attach(model, k=1, device="cpu")
    accelerator = SuperpipeAccelerator(cpu=True, superpipe={"k": 1})
    accelerator.prepare(model)(torch.ones(1, WIDTH)).sum().backward()
    with pytest.raises(UnsupportedError, match="streams already"):
        attach(model, k=1, device="cpu")
    accelerator.free_memory()
    attach(model, k=1, device="cpu").close()


def test_fp8_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp8"
    with pytest.raises(UnsupportedError, match=r"fp8.*'bf16'"):
        enable(accelerator)


def test_quantised_model_is_refused() -> None:
    model: Any = network()
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    with pytest.raises(UnsupportedError, match=r"quantised \(bitsandbytes\).*bfloat16"):
        SuperpipeAccelerator(cpu=True).prepare(model)


SCRIPT = """
import torch
from lightning_superpipe import SuperpipeAccelerator
accelerator = SuperpipeAccelerator(superpipe=dict(k=2))
model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
optimizer.step()
accelerator.print("loads", accelerator.report().num_loads)
"""


@pytest.mark.slow
def test_launcher_with_one_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    assert "loads 6" in done.stdout, done.stderr
