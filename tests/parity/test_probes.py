"""Every probe leaves what the ordinary run leaves, on every device, through several windows."""

from __future__ import annotations

import pytest

from tests.parity import (
    cases_autograd,
    cases_checkpointing,
    cases_compiled,
    cases_escape,
    cases_lifetime,
    cases_loop,
    cases_modules,
    cases_optimizers,
    cases_parameters,
    cases_reads,
)
from tests.parity.harness import Window, assert_equal, placements, run_plain, run_streamed
from tests.parity.probe import CASES, Device, ParityCase

# Importing a file of cases registers its probes.
__all__ = [
    "cases_autograd",
    "cases_checkpointing",
    "cases_compiled",
    "cases_escape",
    "cases_lifetime",
    "cases_loop",
    "cases_modules",
    "cases_optimizers",
    "cases_parameters",
    "cases_reads",
]

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS = (Window(2, 1), Window(3, 2, max_delay_ms=1.0))


def _module_of(case: ParityCase) -> str:
    return getattr(case.module, "__module__", "")


RECOMPUTE, OFFLOAD = Window(2, 1, 1.0, "recompute"), Window(3, 2, 1.0, "offload")
# Offloading is about what autograd saves, so the probes of saving and escaping are enough.
OF_SAVING = tuple(cases.__name__ for cases in (cases_autograd, cases_checkpointing, cases_escape))
# What another policy cannot leave as it is, and why.
OTHERWISE = {
    "out_of_memory_caught": "it runs out of memory at other points, for it needs less",
    "stale_graph_fused": "recomputing would use the new weights, so it is refused",
}

EXACT = [case for case in CASES.values() if not case.inherent]
DONE_EITHER_WAY = [case for case in EXACT if case.name not in OTHERWISE]
INHERENT = [case for case in CASES.values() if case.inherent]


@pytest.mark.parametrize(("case", "device", "window"), placements(EXACT, WINDOWS))
def test_probe_equals_the_ordinary_run(case: ParityCase, device: Device, window: Window) -> None:
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


@pytest.mark.parametrize(
    ("case", "device", "window"),
    [
        *placements(DONE_EITHER_WAY, [RECOMPUTE], ["emu"]),
        *placements([case for case in DONE_EITHER_WAY if _module_of(case) in OF_SAVING], [OFFLOAD]),
    ],
)
def test_probe_equals_the_ordinary_run_whatever_becomes_of_activations(
    case: ParityCase, device: Device, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_superpipe.engine.offload.MIN_BYTES", 1)
    assert_equal(run_plain(case, device), run_streamed(case, device, window))


def test_recomputing_after_a_fused_update_is_refused() -> None:
    raised = {
        policy: [bool(value) for name, value in run_streamed(case, "cpu", window).extra if name == "raised"]
        for case in [CASES["stale_graph_fused"]]
        for policy, window in (("keep", Window(2, 1)), ("recompute", Window(2, 1, 0.0, "recompute")))
    }
    assert not any(raised["keep"])
    assert raised["recompute"]
    assert all(raised["recompute"])


@pytest.mark.parametrize(("case", "device", "window"), placements(INHERENT, WINDOWS[:1]))
def test_documented_difference_changes_no_number(case: ParityCase, device: Device, window: Window) -> None:
    reference, candidate = run_plain(case, device), run_streamed(case, device, window)
    assert_equal(reference, candidate, ignore_extra=True)
    with pytest.raises(AssertionError, match="extra"):
        assert_equal(reference, candidate)
