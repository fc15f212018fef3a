"""Weights and optimizer states in files leave what the ordinary run leaves, bit for bit: every probe, in every mode."""

from __future__ import annotations

import pytest

from tests.parity.harness import Window, assert_equal, placements, run_plain, run_streamed
from tests.parity.probe import Device, ParityCase
from tests.parity.test_probes import EXACT

pytestmark = pytest.mark.filterwarnings("ignore")

PROBED = Window(3, 2, max_delay_ms=1.0, store="disk")


@pytest.mark.parametrize(("case", "device", "window"), placements(EXACT, [PROBED]))
def test_probe_equals_the_ordinary_run_with_files(case: ParityCase, device: Device, window: Window) -> None:
    assert_equal(run_plain(case, device), run_streamed(case, device, window))
