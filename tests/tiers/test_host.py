"""Host memory: exact, private to the process, page-locked where the driver allows it."""

from __future__ import annotations

import mmap
import os
import resource
import warnings
from pathlib import Path

import pytest
import torch

from lightning_superpipe.errors import BudgetError, SuperpipeWarning
from lightning_superpipe.tiers import HostTier

MIB = 2**20


def resident_bytes() -> int:
    """Return the memory of this process that is in use, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def mapped_bytes() -> int:
    """Return the address space of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


linux_only = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@linux_only
def test_slab_takes_what_it_holds_and_not_the_next_power_of_two() -> None:
    tier = HostTier(pin=False)
    before = mapped_bytes()
    slab = tier.allocate(33 * MIB)
    assert mapped_bytes() - before < 34 * MIB
    del slab
    tier.close()


@linux_only
def test_memory_goes_back_when_the_last_tensor_has_gone() -> None:
    tier = HostTier(pin=False)
    before = resident_bytes()
    carved = tier.allocate(32 * MIB).carve(0, torch.empty(8 * MIB)).fill_(1.0)
    assert resident_bytes() - before > 30 * MIB
    tier.close()
    assert resident_bytes() - before > 30 * MIB
    del carved
    assert resident_bytes() - before < 2 * MIB


def test_slab_starts_on_a_page() -> None:
    assert HostTier(pin=False).allocate(100).bytes.data_ptr() % mmap.PAGESIZE == 0


def test_forked_workers_do_not_see_later_updates() -> None:
    tier = HostTier(pin=False)
    weights = tier.allocate(4096).carve(0, torch.empty(16)).fill_(1.0)
    values = weights.numpy()
    go, answer = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process has threads; the child runs no Python of theirs
        child = os.fork()
    if child == 0:  # no pytest, no torch: read, answer, end
        os.read(go[0], 1)
        seen = values[0]
        values[0] = 5.0
        os.write(answer[1], b"old" if seen == 1.0 else b"new")
        os._exit(0)
    weights.fill_(2.0)
    os.write(go[1], b"!")
    assert os.read(answer[0], 3) == b"old"
    os.waitpid(child, 0)
    assert weights.eq(2).all(), "nor does the model see what they write"
    for end in (*go, *answer):
        os.close(end)


def test_host_without_room_is_an_error_with_the_numbers() -> None:
    tier = HostTier(pin=False)
    tier.allocate(1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + 64 * MIB, hard))
    try:
        with pytest.raises(BudgetError, match=rf"no room for {1024 * MIB} more bytes \(1000 are in use"):
            tier.allocate(1024 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert tier.allocated_bytes == 1000


# -- page locks


class Driver:
    """Stands in for the driver's two calls: allows so many bytes to be locked."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if sum(self.locked.values()) + num_bytes > self.allowed:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(allowed=1000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


def test_every_slab_is_locked_as_a_whole_and_unlocked_at_close(driver: Driver) -> None:
    tier = HostTier(pin=True)
    slabs = [tier.allocate(300), tier.allocate(400)]
    assert all(slab.pinned for slab in slabs)
    assert driver.locked == {slab.bytes.data_ptr(): slab.num_bytes for slab in slabs}
    tier.close()
    tier.close()
    assert driver.locked == {}


def test_refused_lock_warns_once_and_goes_on_pageable(driver: Driver) -> None:
    tier = HostTier(pin=True)
    tier.allocate(900)
    with pytest.warns(SuperpipeWarning, match=r"refused to page-lock 200 bytes.*pin_memory=False"):
        assert not tier.allocate(200).pinned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tier.allocate(10).pinned
    tier.close()
    assert driver.locked == {}


def test_empty_slab_is_not_locked(driver: Driver) -> None:
    tier = HostTier(pin=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tier.allocate(0)
    assert driver.locked == {}


def test_nothing_is_locked_unless_asked(driver: Driver) -> None:
    HostTier(pin=False).allocate(100)
    assert driver.locked == {}


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a kernel with large pages")
def test_slabs_ask_for_large_pages() -> None:
    slab = HostTier(pin=False).allocate(8 * MIB)
    address, flags = slab.bytes.data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.split(maxsplit=1)[0].partition("-")
        if last:
            is_ours = int(first, 16) <= address < int(last, 16)
        elif line.startswith("VmFlags") and is_ours:
            flags = line
    assert " hg" in flags
