"""Files of the disk store: two views of the same bytes, one user at a time, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_superpipe.config import Disk
from lightning_superpipe.errors import BudgetError, SuperpipeWarning, TransferError, UnsupportedError
from lightning_superpipe.tiers import DiskTier, Folder
from lightning_superpipe.tiers import disk as disk_module
from lightning_superpipe.tiers.direct_file import BLOCK, DirectFile
from lightning_superpipe.tiers.disk import DiskSlab
from lightning_superpipe.tiers.host import HostSlab
from lightning_superpipe.tiers.requests import Requests
from tests.processes import run_code

NUM_BYTES = 9 * (1 << 20) + 100  # three requests, the last one short

Make = Callable[..., DiskTier]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make tiers in folders of their own."""
    made: list[tuple[DiskTier, Folder, Requests]] = []

    def make_tier(*, with_undo: bool = False, keep: bool = False) -> DiskTier:
        options = Disk(folder=str(tmp_path / f"store-{len(made)}"), keep=keep)
        folder, requests = Folder(options), Requests(options.requests)
        made.append((DiskTier("weights", folder, requests, options, with_undo=with_undo), folder, requests))
        return made[-1][0]

    yield make_tier
    for tier, folder, requests in made:
        tier.close()
        requests.close()
        folder.close()


def memory(slab: DiskSlab, seed: int) -> Tensor:
    """Page-aligned memory of a slab's size, with random bytes."""
    room = HostSlab(slab.room_bytes, pin=False).bytes
    return room.copy_(torch.randint(256, room.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("with_undo", [False, True])
def test_what_is_stored_shows_in_tensors_and_what_tensors_hold_is_fetched(make: Make, with_undo: bool) -> None:
    slab = make(with_undo=with_undo).allocate(NUM_BYTES)
    seen = slab.carve(256, torch.empty(1000, 1000))
    for seed in range(3):
        stored = memory(slab, seed)
        slab.store(stored)
        assert torch.equal(slab.bytes, stored[:NUM_BYTES])
        assert torch.equal(seen.view(torch.uint8).flatten(), stored[256 : 256 + seen.nbytes])
        seen.fill_(seed)
        fetched = memory(slab, 99)
        slab.fetch(fetched)
        assert torch.equal(fetched[256 : 256 + seen.nbytes].view(torch.float32), seen.flatten())
        assert torch.equal(fetched[256 + seen.nbytes : NUM_BYTES], stored[256 + seen.nbytes : NUM_BYTES])


def test_undo_brings_back_what_was_there_before_the_step_and_commit_does_not(make: Make) -> None:
    tier = make(with_undo=True)
    slab, untouched = tier.allocate(NUM_BYTES), tier.allocate(BLOCK)
    address = slab.bytes.data_ptr()
    untouched.bytes.fill_(7)
    slab.store(memory(slab, 0))
    tier.commit()
    for seed in (1, 2):  # twice in one step: two optimizers
        slab.store(memory(slab, seed))
    assert torch.equal(slab.bytes, memory(slab, 2)[:NUM_BYTES])
    tier.undo()
    assert torch.equal(slab.bytes, memory(slab, 0)[:NUM_BYTES])
    tier.undo()  # nothing is left to undo
    assert torch.equal(slab.bytes, memory(slab, 0)[:NUM_BYTES])
    assert untouched.bytes.eq(7).all()
    assert slab.bytes.data_ptr() == address


def test_what_is_not_expected_to_change_takes_its_room_once_and_can_be_undone_all_the_same(make: Make) -> None:
    tier = make(with_undo=True)
    before = tier.file.size  # what was tried out
    tier.reserve([BLOCK], unchanging=[NUM_BYTES])
    once = -(-NUM_BYTES // BLOCK) * BLOCK
    assert tier.file.size - before == once + 2 * BLOCK
    slab = tier.allocate(NUM_BYTES, changes=False)
    tier.allocate(BLOCK)
    assert tier.file.size - before == once + 2 * BLOCK
    slab.bytes.copy_(memory(slab, 0)[:NUM_BYTES])
    slab.store(memory(slab, 1))
    assert torch.equal(slab.bytes, memory(slab, 1)[:NUM_BYTES])
    tier.undo()
    assert torch.equal(slab.bytes, memory(slab, 0)[:NUM_BYTES])


def test_counters_count_what_requests_move(make: Make) -> None:
    tier = make()
    slab = tier.allocate(NUM_BYTES)
    slab.store(memory(slab, 0))
    slab.fetch(memory(slab, 1))
    slab.fetch(memory(slab, 1))
    assert (tier.file.num_written_bytes, tier.file.num_read_bytes) == (slab.room_bytes, 2 * slab.room_bytes)


def test_file_has_its_full_size_before_anything_is_allocated(make: Make) -> None:
    tier = make(with_undo=True)
    tier.reserve([NUM_BYTES])
    status = os.fstat(tier.file.descriptor)
    assert status.st_size >= 2 * NUM_BYTES
    assert status.st_blocks * 512 >= 2 * NUM_BYTES, "the blocks are the file's, it is no hole"


def test_room_that_was_taken_is_not_asked_for_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make(with_undo=True)
    tier.reserve([NUM_BYTES])
    size = os.fstat(tier.file.descriptor).st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0})())
    tier.reserve([NUM_BYTES])
    tier.allocate(NUM_BYTES)
    assert os.fstat(tier.file.descriptor).st_size == size


def test_more_than_the_disk_has_is_refused_with_the_numbers(make: Make) -> None:
    with pytest.raises(BudgetError, match=rf"{1 << 50} bytes.* left.*disk\.undo=False"):
        make().reserve([1 << 50])


def test_short_file_is_an_error_and_not_zeros(make: Make) -> None:
    tier = make()
    slab = tier.allocate(NUM_BYTES)
    os.ftruncate(tier.file.descriptor, slab.offset + BLOCK)
    with pytest.raises(TransferError, match=r"weights could not be read: only 4096 of"):
        slab.fetch(memory(slab, 0))


def test_where_views_differ_all_goes_through_the_page_cache_and_that_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_is_coherent", lambda file: False)
    with pytest.warns(SuperpipeWarning, match="page cache"):
        tier = make(with_undo=True)
    slab = tier.allocate(NUM_BYTES)
    slab.store(memory(slab, 5))
    assert not tier.file.is_direct
    assert torch.equal(slab.bytes, memory(slab, 5)[:NUM_BYTES])


def test_file_system_without_direct_requests_is_said(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(SuperpipeWarning, match="page cache"):
        tier = make()
    slab = tier.allocate(NUM_BYTES)
    slab.store(memory(slab, 5))
    assert torch.equal(slab.bytes, memory(slab, 5)[:NUM_BYTES])


def test_regions_are_used_again(tmp_path: Path) -> None:
    file = DirectFile(tmp_path / "a.bytes", Requests(1), is_named=True)
    first, second = file.region(BLOCK), file.region(3 * BLOCK)
    file.give_back(first, 1)
    assert (file.region(BLOCK), file.region(BLOCK)) == (first, 4 * BLOCK)
    assert second == BLOCK
    file.close()


def test_memory_as_a_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lightning_superpipe.tiers.folder._IN_MEMORY", ("ext4", "xfs", "btrfs", "overlay", "tmpfs"))
    with pytest.warns(SuperpipeWarning, match="memory itself"):
        Folder(Disk(folder=str(tmp_path / "store"))).close()


def test_second_run_is_refused_while_the_first_uses_the_folder(tmp_path: Path) -> None:
    options = Disk(folder=str(tmp_path / "store"))
    folder = Folder(options)
    code = "from lightning_superpipe.tiers import Folder; from lightning_superpipe.config import Disk; "
    code += f"Folder({options!r})"
    ran = run_code(code, folder=tmp_path)
    assert ran.returncode and "UnsupportedError" in ran.stderr
    assert f"in use by another run (process {os.getpid()})" in ran.stderr
    with pytest.raises(UnsupportedError, match="in use"):
        Folder(options)
    folder.close()
    Folder(options).close()
    assert not (tmp_path / "store").exists()


def test_files_that_a_killed_run_has_left_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "weights.bytes").write_bytes(b"torn")
    (tmp_path / "manifest.json.draft").write_text("{")
    (tmp_path / "mine.txt").write_text("a user's own file")
    folder = Folder(Disk(folder=str(tmp_path)))
    assert not (tmp_path / "weights.bytes").exists()
    folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedError, match="cannot use the folder"):
        Folder(Disk(folder=str(tmp_path / "file" / "store")))
