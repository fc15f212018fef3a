"""Bytes on the host by kind are measured, and a host that is too small is refused before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_superpipe import SuperpipeStrategy, host_memory
from lightning_superpipe.adapters.plain import attach
from lightning_superpipe.config import Adversary
from lightning_superpipe.errors import BudgetError
from lightning_superpipe.observe import host_bytes
from lightning_superpipe.observe.host_bytes import HostBytes, available_bytes
from lightning_superpipe.optimizer.state_size import missing_state_bytes
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.tiers import HostTier
from tests.engine.tiny import batches, chain
from tests.parity.harness import trainer
from tests.parity.probe import ProbeModule
from tests.precision.loops import OPTIMIZERS

WIDTH = 64  # alignment costs little beside matrices of this size
NUM_BLOCKS = 12
LATE = {"update": "after_backward", "adversary": Adversary(), "k": 2}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, pipe: Any, steps: int = 2) -> HostBytes:
    dtype = next(module.parameters()).dtype
    for x in batches(steps, width=WIDTH):
        optimizer.zero_grad()
        module(x.to(dtype)).float().pow(2).mean().backward()
        optimizer.step()
    held: HostBytes = pipe.report().host
    return held


# -- measured


@pytest.mark.parametrize(
    ("is_half", "options", "expected"),
    [
        # weights, gradients and states, bytes per parameter; staging is bounded by units below
        (False, {}, (4, 4, 8)),
        (False, {"wire_dtype": "bfloat16"}, (4, 4, 8)),
        (True, {"master_weights": "float32"}, (2, 2, 12)),
        (True, {}, (2, 2, 4)),
    ],
    ids=str,
)
def test_bytes_per_parameter_are_as_designed(
    is_half: bool, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    module = chain(NUM_BLOCKS, width=WIDTH)
    module = module.bfloat16() if is_half else module
    optimizer = OPTIMIZERS["fused"](module.parameters())
    with attach(module, optimizer, device="cpu", link={}, **LATE, **options) as pipe:
        held = train(module, optimizer, pipe)
        num_parameters = pipe.report().num_parameters
    weights, staging, gradients, states = held.per(num_parameters)
    # Each tensor begins at a multiple of 256 bytes; each has a step counter.
    assert (weights, gradients, states) == pytest.approx(expected, rel=0.07)
    assert min(weights - expected[0], gradients - expected[1], states - expected[2]) >= 0
    of_a_unit = num_parameters * (4 if not is_half else 2) / NUM_BLOCKS
    assert staging * num_parameters <= (3 * 0.6 * of_a_unit + 2 * of_a_unit if options else 0) + 4 * 2**21


def test_staging_is_a_few_units_however_long_the_run() -> None:
    module = chain(NUM_BLOCKS, width=WIDTH)
    optimizer = OPTIMIZERS["fused"](module.parameters())
    with attach(module, optimizer, device="cpu", link={}, wire_dtype="bfloat16", **LATE) as pipe:
        held = [train(module, optimizer, pipe, steps=steps).staging for steps in (1, 2, 10)]
    unit = 2 * sum(parameter.numel() for parameter in module.blocks[0].parameters())
    # Three buffers, and gradients that land: as many of each size as were ever on their way together.
    assert all(3 * unit <= staging <= 6 * unit for staging in held)


def test_memory_of_slabs_is_exact() -> None:
    tier = HostTier(pin=False)
    tier.part("weights").allocate(129 << 20)
    assert tier.allocated_bytes == tier.part("weights").allocated_bytes == 129 << 20
    assert tier.part("wire").allocated_bytes == 0
    tier.close()
    assert tier.allocated_bytes == 0


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("is_half", [False, True])
def test_states_are_foreseen_as_they_come(name: str, is_half: bool) -> None:
    module = chain(3, width=WIDTH)
    module = module.bfloat16() if is_half else module
    optimizer = OPTIMIZERS[name](module.parameters())
    foreseen = missing_state_bytes(optimizer, with_masters=False)
    if name == "adagrad":  # makes its states at once
        assert foreseen == 0
        return
    module(batches(1, width=WIDTH)[0].to(next(module.parameters()).dtype)).float().mean().backward()
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert foreseen == sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and value.dim())
    assert missing_state_bytes(optimizer, with_masters=False) == (foreseen if name == "sgd" else 0)


# -- refused


def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(tier: HostTier, num_bytes: int) -> None:
        raise AssertionError(f"{num_bytes} bytes were allocated")

    monkeypatch.setattr(HostTier, "allocate", allocate)


@pytest.mark.parametrize(
    ("is_half", "options"),
    [(False, {"wire_dtype": "bfloat16"}), (True, {"master_weights": "float32"}), (False, {})],
    ids=str,
)
def test_cap_that_is_just_enough_is_taken_and_one_byte_less_is_refused(
    is_half: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = chain(4, width=WIDTH)
    module = module.bfloat16() if is_half else module
    optimizer = OPTIMIZERS["fused"](module.parameters())
    with pytest.raises(BudgetError) as refused:
        attach(module, optimizer, device="cpu", host_memory=0, **options)
    need = int(str(refused.value).split(" bytes)")[0].rpartition("(")[2])
    with attach(module, optimizer, device="cpu", host_memory=need, **options):
        pass
    nothing_is_allocated(monkeypatch)
    with pytest.raises(BudgetError, match=rf"{need} bytes.*{need - 1} bytes.*Use a host with more memory") as refused:
        attach(module, optimizer, device="cpu", host_memory=need - 1, **options)
    assert ("float32 masters" in str(refused.value)) == ("master_weights" in options)


def test_host_without_room_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    module = chain(4, width=WIDTH)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    with monkeypatch.context() as patch:
        nothing_is_allocated(patch)
        with pytest.raises(BudgetError, match=r"1000 bytes\) available.*host_memory"):
            attach(module, OPTIMIZERS["fused"](module.parameters()), device="cpu")
    with attach(module, OPTIMIZERS["fused"](module.parameters()), device="cpu", host_memory="1GiB"):
        pass


def test_trainer_refuses_before_its_first_step() -> None:
    module = ProbeModule()
    with pytest.raises(BudgetError, match="optimizer states"):
        weights = sum(parameter.nbytes for parameter in module.parameters())
        trainer("cpu", SuperpipeStrategy(k=2, host_memory=2 * weights + 1)).fit(module)
    assert module.losses == []
    trainer("cpu", SuperpipeStrategy(k=2, host_memory="1GB"), max_epochs=1).fit(module)
    assert isinstance(module, L.LightningModule) and module.losses


def test_what_is_held_already_is_not_asked_for_again() -> None:
    need = HostNeed(weights=40, gradients=40, states=80, held=40)
    need.check(available=120, limit=None)
    with pytest.raises(BudgetError, match="119 bytes"):
        need.check(available=119, limit=None)
    need.check(available=0, limit=160)


# -- what a machine has


def group(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


def test_the_tightest_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/jobs/mine\n")
    group(root, "max", 10, 0)
    group(root / "jobs", "2000", 500, 100)
    group(root / "jobs" / "mine", "5000", 400, 0)
    monkeypatch.setattr(host_bytes, "_CGROUPS", root)
    monkeypatch.setattr(host_bytes, "_OWN_GROUP", own)
    assert available_bytes() == 2000 - 500 + 100
    group(root / "jobs", "max", 500, 100)
    assert available_bytes() == 4600
    monkeypatch.setattr(host_bytes, "_CGROUPS", tmp_path / "none")
    assert available_bytes() > 1 << 20


def test_sparse_buffer_is_no_obstacle() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    module.register_buffer("graph", torch.eye(3).to_sparse())
    with attach(module, device="cpu", k=1) as pipe:
        module(torch.ones(2, 4)).sum().backward()
        assert pipe.report().host.weights > 0
