"""What every tier offers; a new tier is one more entry of the list."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_superpipe.config import Disk
from lightning_superpipe.engine.slots import ALIGNMENT, storage_key
from lightning_superpipe.tiers import DiskTier, Folder, HostTier, Tier
from lightning_superpipe.tiers.requests import Requests


def disk_tier(folder: Path, with_undo: bool = False) -> Tier:
    options = Disk(folder=str(folder))
    return DiskTier("weights", Folder(options), Requests(options.requests), options, with_undo=with_undo)


TIERS: dict[str, Callable[[Path], Tier]] = {
    "host": lambda _: HostTier(pin=False),
    "disk": disk_tier,
    "disk with undo": partial(disk_tier, with_undo=True),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool, torch.uint8]


@pytest.fixture(params=list(TIERS))
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    tier = TIERS[request.param](tmp_path)
    yield tier
    tier.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 4096, 4097, 100_001])
def test_slab_has_exactly_the_bytes_asked_for(tier: Tier, num_bytes: int) -> None:
    slab = tier.allocate(num_bytes)
    assert slab.num_bytes == slab.bytes.numel() == slab.bytes.nbytes == num_bytes
    assert slab.bytes.dtype is torch.uint8
    assert slab.bytes.device.type == "cpu"
    assert tier.allocated_bytes == num_bytes


def test_allocated_bytes_add_up_until_close(tier: Tier) -> None:
    for num_bytes in (10, 20, 30):
        tier.allocate(num_bytes)
    assert tier.allocated_bytes == 60
    tier.close()
    assert tier.allocated_bytes == 0
    tier.close()


def test_slabs_do_not_overlap(tier: Tier) -> None:
    first, second = tier.allocate(100), tier.allocate(100)
    first.bytes.fill_(1)
    second.bytes.fill_(2)
    assert first.bytes.eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_carved_tensor_has_the_layout_of_its_model_and_lies_at_its_offset(tier: Tier, dtype: torch.dtype) -> None:
    slab = tier.allocate(4 * ALIGNMENT)
    for like in (
        torch.zeros(3, 4).to(dtype),
        torch.zeros(4, 3).to(dtype).t(),
        torch.zeros(1, 2, 2, 3).to(dtype).to(memory_format=torch.channels_last),
        torch.zeros(()).to(dtype),
        torch.zeros(0, 3).to(dtype),
    ):
        carved = slab.carve(ALIGNMENT, like)
        assert (carved.dtype, carved.size(), carved.stride()) == (dtype, like.size(), like.stride())
        assert not like.numel() or carved.data_ptr() == slab.bytes.data_ptr() + ALIGNMENT


def test_carved_tensor_shares_the_bytes_of_its_slab(tier: Tier) -> None:
    slab = tier.allocate(64)
    slab.bytes.zero_()
    carved = slab.carve(16, torch.empty(4))
    carved.copy_(torch.arange(4.0))
    assert torch.equal(slab.bytes[16:32].view(torch.float32), torch.arange(4.0))
    assert slab.bytes[:16].eq(0).all()
    assert slab.bytes[32:].eq(0).all()


def test_carved_tensor_has_a_storage_of_exactly_its_own_bytes(tier: Tier) -> None:
    slab = tier.allocate(1_000_000)
    first, second = slab.carve(0, torch.empty(10)), slab.carve(ALIGNMENT, torch.empty(10))
    assert first.untyped_storage().nbytes() == 40
    assert storage_key(first) != storage_key(second)
    file = io.BytesIO()
    torch.save(first.fill_(1.0), file)
    assert file.tell() < 5000, "the neighbours are not saved with it"
    file.seek(0)
    assert torch.equal(torch.load(file), torch.ones(10))


def test_carved_tensor_is_an_ordinary_one(tier: Tier) -> None:
    parameter = torch.nn.Parameter(tier.allocate(64).carve(0, torch.empty(8)))
    with torch.no_grad():
        parameter.fill_(1.0)
    loss = (parameter * 2).sum()
    parameter.grad = torch.autograd.grad(loss, parameter)[0]
    torch.optim.SGD([parameter], lr=0.5).step()
    assert parameter.eq(0).all()


def test_carving_beyond_the_slab_is_an_error(tier: Tier) -> None:
    slab = tier.allocate(64)
    with pytest.raises(ValueError):
        slab.carve(48, torch.empty(8))


def test_carved_tensors_outlive_slab_and_tier(tier: Tier) -> None:
    slab = tier.allocate(64)
    carved = slab.carve(0, torch.empty(8)).fill_(3.0)
    slab.close()
    tier.close()
    del slab
    assert carved.eq(3).all()


def test_memory_of_a_closed_slab_is_nobody_elses_while_a_tensor_holds_it(tier: Tier) -> None:
    slab = tier.allocate(64)
    carved = slab.carve(0, torch.empty(8)).fill_(3.0)
    slab.close()
    tier.allocate(64).bytes.fill_(1)
    assert carved.eq(3).all()
