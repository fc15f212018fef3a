"""The machine profile of a real link."""

from __future__ import annotations

import pytest

from lightning_superpipe.observe import Route, measure_machine
from tests.gpu.places import CUDA

SIZES = (1 << 20, 64 << 20)


@pytest.mark.gpu
def test_every_route_and_kind_of_memory_is_measured() -> None:
    held = CUDA.used_bytes()
    profile = measure_machine(CUDA.device, copy_bytes=SIZES, num_parameters=1 << 20, threads=[1])
    asked = {(route, pinned, num_bytes) for route in Route for pinned in (True, False) for num_bytes in SIZES}
    assert {(copy.route, copy.pinned, copy.num_bytes) for copy in profile.copies} == asked
    assert not profile.emulated
    assert all(min(copy.seconds) > 0 for copy in profile.copies)
    assert CUDA.used_bytes() == held
