"""All that files will need of the disk is taken before the first step, and no more; refusals tell the numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from lightning_superpipe import attach, map_safetensors
from tests.disk.loops import EVERYTHING, WIDTH, left, make
from tests.processes import run_code

pytestmark = pytest.mark.filterwarnings("ignore")
Optimizers = Callable[[nn.Module], list[Optimizer]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the disk that are taken, piece by piece."""
    take, pieces = os.posix_fallocate, []

    def counted(descriptor: int, offset: int, num_bytes: int) -> None:
        take(descriptor, offset, num_bytes)
        pieces.append(num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", counted)
    return pieces


def one(kind: type[Optimizer], **options: Any) -> Optimizers:
    return lambda model: [kind(model.parameters(), lr=1e-2, foreach=False, **options)]  # type: ignore[call-arg]


def two(model: nn.Module) -> list[Optimizer]:
    """Each has a half of every unit."""
    parameters = list(model.parameters())
    return [AdamW(half, foreach=False) for half in (parameters[::2], parameters[1::2])]


@pytest.mark.parametrize(
    ("optimizers", "dtype", "options"),
    [
        (one(AdamW), torch.float32, {}),
        (one(AdamW, amsgrad=True), torch.float32, {"disk": {"undo": False}}),
        (one(SGD, momentum=0.9), torch.float32, {}),
        (one(Adafactor), torch.float32, {}),
        (two, torch.float32, {}),
        (one(AdamW), torch.bfloat16, {"master_weights": "float32"}),
        (one(AdamW), torch.float32, {"store": {**EVERYTHING, "activations": "host"}}),
    ],
    ids=["AdamW", "amsgrad", "SGD", "Adafactor", "two", "masters", "gradients"],
)
def test_nothing_more_is_taken_once_training_has_begun(
    optimizers: Optimizers, dtype: torch.dtype, options: dict[str, Any], taken: list[int]
) -> None:
    model, _ = make(dtype=dtype)
    chosen = optimizers(model)
    with attach(model, *chosen, device="cpu", k=2, **{"store": "disk", **options}) as pipe:
        before = sum(taken)
        for number in range(3):
            x = torch.full((4, WIDTH), float(number), dtype=dtype)
            model(x).float().pow(2).mean().backward()
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()
        left(model, chosen[0])  # nothing is under way
        assert pipe.report().total.disk_written_bytes > 0
    assert before > 0
    assert sum(taken) == before


def test_checkpoint_that_is_read_where_it_lies_takes_nothing(tmp_path: Path, taken: list[int]) -> None:
    model, _ = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(map_safetensors(tmp_path), assign=True)
    model.requires_grad_(False)
    unit = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    with attach(model, device="cpu", k=2, store={"weights": "disk"}), torch.no_grad():
        model(torch.ones(2, WIDTH))
    assert sum(taken) < unit  # a block, to try the file out


def test_limit_of_file_sizes_is_told_with_numbers_at_the_start(tmp_path: Path) -> None:
    code = "import resource; from tests.disk.loops import make; from lightning_superpipe import attach; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); model, optimizer = make(); "
    code += "attach(model, optimizer, device='cpu', k=2, store='disk')"
    ran = run_code(code, folder=tmp_path)
    assert ran.returncode
    said = ran.stderr.splitlines()[-1]
    assert "BudgetError: the disk store needs " in said
    assert "File too large" in said
