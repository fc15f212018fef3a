"""``device_memory`` is a promise: what does not fit is refused before the first step, with the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.errors import BudgetError, SuperpipeWarning
from tests.lightning.stories import Originals, assert_refused, assert_usable
from tests.parity.harness import trainer
from tests.parity.probe import ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")

# ProbeModule: six units, the largest a block of 4,416 bytes in a slot of 5,120 (each tensor aligned).

SLOT = 5120
GRADIENTS = 2 * SLOT


def need(k: int) -> int:
    """Bytes that training through a window of ``k`` needs before any activation."""
    return k * SLOT + GRADIENTS


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_a_budget_that_is_just_enough_is_taken_and_one_byte_less_is_refused(k: int) -> None:
    strategy = SuperpipeStrategy(k=k, device_memory=need(k))
    module = ProbeModule()
    trainer("cpu", strategy, max_epochs=1).fit(module)
    report = strategy.report()
    assert report.k == k and report.peak.slots + report.peak.anchors + report.peak.gradients <= need(k)

    module = ProbeModule()
    message = assert_refused(module, SuperpipeStrategy(k=k, device_memory=need(k) - 1), f"k={k} needs")
    assert str(need(k)) in message and str(need(k) - 1) in message
    assert "'blocks.0'" in message and "5.0 KiB" in message
    assert f"Use k<={k - 1}" in message if k > 1 else "allow at least" in message
    assert_usable(module)


def test_a_unit_larger_than_the_budget_is_named() -> None:
    module = ProbeModule()
    message = assert_refused(module, SuperpipeStrategy(k=1, device_memory=SLOT - 1), "alone is larger than the budget")
    assert "'blocks.0'" in message and "units=" in message and str(need(1)) in message
    assert_usable(module)


def test_without_a_given_k_the_largest_that_fits_is_taken() -> None:
    strategy = SuperpipeStrategy(device_memory=need(2))
    trainer("cpu", strategy, max_epochs=1).fit(ProbeModule())
    assert strategy.report().k == 2
    assert_refused(ProbeModule(), SuperpipeStrategy(device_memory=need(1) - 1), "k=3 needs")


def test_evaluation_needs_no_room_for_gradients() -> None:
    strategy = SuperpipeStrategy(k=2, device_memory=2 * SLOT)
    trainer("cpu", strategy).validate(ProbeModule(), verbose=False)
    assert strategy.report().num_loads > 0
    assert_refused(ProbeModule(), SuperpipeStrategy(k=2, device_memory=2 * SLOT), "gradients on their way home")


@pytest.mark.emu
def test_the_allocator_never_sees_more_than_the_budget_and_activations() -> None:
    from tests.emu import EmuAccelerator, peak_bytes, reset_peak, used_bytes

    base = used_bytes()
    strategy = SuperpipeStrategy(k=2, device_memory=need(2))
    reset_peak()
    run = trainer("emu", strategy, max_epochs=2)
    run.fit(ProbeModule())
    report = strategy.report()
    assert peak_bytes() - base <= need(2) + report.peak.activations
    assert isinstance(run.accelerator, EmuAccelerator)


class ReadsAll(ProbeModule):
    """A loss over all parameters would fetch the whole model onto the device."""

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + sum((p.pow(2).sum() for p in self.parameters()), torch.zeros(())) * 1e-3


def test_reads_outside_units_that_break_the_budget_are_refused_with_their_bytes() -> None:
    module = ReadsAll()
    originals = Originals(module)
    with pytest.raises(BudgetError, match=r"read outside their unit.*device_memory allows") as caught:
        trainer("cpu", SuperpipeStrategy(k=2, device_memory=need(2)), max_epochs=1, num_sanity_val_steps=0).fit(module)
    assert "blocks.0" in str(caught.value)
    originals.assert_kept()
    with pytest.warns(SuperpipeWarning, match="read outside their unit"):
        trainer("cpu", SuperpipeStrategy(k=2), max_epochs=1).fit(ReadsAll())
