"""Every probe of tests/parity on CUDA, against the ordinary run on the same device with its updates on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from tests.gpu.host_updates import updates_at_home
from tests.gpu.places import Place, on_both
from tests.parity.harness import Outcome, Window, assert_equal, first_difference, run_case, run_plain, run_streamed
from tests.parity.probe import CASES, Block, ParityCase, ProbeModule
from tests.parity.test_models import FUSED, GENERATING, PLAIN
from tests.parity.test_probes import EXACT

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOW = Window(2, 1)
WIDER = Window(3, 2)

NOT_HERE = {
    "lbfgs": "it calls its closure several times: the reference cannot make its steps at home",
    "out_of_memory_caught": "it caps the emulated device; tests/gpu/test_memory.py does so here",
}
ROUNDS = {
    "accumulated_clipped": "the norm of gradients is summed on the host",
    "loss_scaling": "the norm of gradients is summed on the host",
    "own_moving_average": "averages are made where the weights are: on the host",
    "lightning_moving_average": "averages are made where the weights are: on the host",
    "stochastic_averaging": "averages are made where the weights are: on the host",
}
"""Cases whose arithmetic outside the model happens on another device than the ordinary run's."""

SAMPLE = ("plain", "tied_head_fused", "two_fused_steps_tied", "recurrent", "bf16_mixed", "clipped_by_value")


def judge(case: ParityCase, place: Place, window: Window) -> None:
    """Compare bit for bit, or closely where another device does a part of the arithmetic."""
    with updates_at_home():
        reference, candidate = run_plain(case, place.name), run_streamed(case, place.name, window)
    assert candidate.num_loads, "nothing was streamed"
    if place.is_gpu and case.name in ROUNDS:
        assert_close(reference, candidate)
    else:
        assert_equal(reference, candidate)


def assert_close(reference: Outcome, candidate: Outcome) -> None:
    """Raise AssertionError unless losses and weights are equal up to the rounding of a few operations."""
    for one, other in zip(reference.losses, candidate.losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reference.weights, candidate.weights, rtol=1e-3, atol=1e-5)


def test_exceptions_are_probes_that_exist() -> None:
    assert set(NOT_HERE) | set(ROUNDS) | set(SAMPLE) <= set(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [WINDOW, WIDER], ids=str)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name not in NOT_HERE], ids=lambda case: case.name)
def test_probe_on_cuda_equals_the_ordinary_run(case: ParityCase, window: Window) -> None:
    judge(case, Place("cuda"), window)


@pytest.mark.emu
@pytest.mark.parametrize("name", [*SAMPLE, *ROUNDS])
def test_the_reference_with_updates_at_home_is_the_reference(name: str) -> None:
    """The emulated device's kernels are the host's, so that moving the updates must change nothing."""
    case = CASES[name]
    with updates_at_home():
        at_home = run_case(case, "emu")
    assert first_difference(run_plain(case, "emu"), at_home) is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*PLAIN, *FUSED, *GENERATING], ids=lambda case: case.name)
def test_model_on_cuda_equals_the_ordinary_run(case: ParityCase) -> None:
    judge(case, Place("cuda"), WINDOW)


# -- what each place must show by itself


class LooksAtGradients(ProbeModule):
    """A hook between backward and update reads gradients whose copies are long and whose compute is short."""

    width = 96

    def build(self) -> None:
        self.embed = nn.Linear(self.embed.in_features, self.width)
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(4))
        self.head = nn.Linear(self.width, 2)
        self.kinds: set[str] = set()

    def on_after_backward(self) -> None:
        for name, parameter in self.named_parameters():
            assert parameter.grad is not None, name
            self.kinds.add(parameter.grad.device.type)
            self.record(name, parameter.grad)


class LooksAtLargeGradients(LooksAtGradients):
    """Copies of tens of megabytes beside products of four rows."""

    width = 2048


@on_both
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_after_backward_see_complete_gradients_at_home(place: Place, accumulate: int) -> None:
    kind = LooksAtLargeGradients if place.is_gpu else LooksAtGradients
    seen: list[LooksAtGradients] = []
    case = case_of(kind, seen, max_epochs=1, accumulate_grad_batches=accumulate)
    judge(case, place, WINDOW)
    assert [module.kinds for module in seen] == [{place.name}, {"cpu"}]


class Overflows(ProbeModule):
    """The scale begins so high that first steps are skipped, then it is halved, then it grows."""

    def on_train_batch_end(self, *args: Any) -> None:
        plugin: Any = self.trainer.precision_plugin
        self.record("scale", plugin.scaler.get_scale())

    def configure_optimizers(self) -> Any:
        return self.adamw(foreach=False, eps=1e-4)


def _overflowing(device: str) -> list[MixedPrecision]:
    scaler = torch.amp.GradScaler(device, init_scale=2.0**26, growth_interval=2)
    return [MixedPrecision("16-mixed", device, scaler)]


@on_both
def test_a_scaler_finds_infinities_in_host_gradients(place: Place) -> None:
    seen: list[Overflows] = []
    judge(case_of(Overflows, seen, plugins=_overflowing, max_epochs=4), place, WINDOW)
    scales = [float(value) for name, value in seen[-1].extra if name == "scale"]
    assert scales[0] < 2.0**26 and sorted(scales) != scales[::-1], "some steps were skipped, and the scale grew again"


class Compiled(ProbeModule):
    """Units whose forward is compiled for the device."""

    backend = "aot_eager"

    def build(self) -> None:
        for block in self.blocks:
            block.compile(backend=self.backend)


class CompiledForDevice(Compiled):
    """Kernels made for the device: they hold addresses of what they were made with."""

    backend = "inductor"


@on_both
def test_a_compiled_unit_equals_the_compiled_plain_one(place: Place) -> None:
    judge(case_of(CompiledForDevice if place.is_gpu else Compiled, [], max_epochs=1), place, WINDOW)


def case_of(kind: type[Any], seen: list[Any], **options: Any) -> ParityCase:
    """Return a case that is not a probe of all devices; the modules of its runs are appended to ``seen``."""

    def made() -> Any:
        seen.append(kind())
        return seen[-1]

    build: Callable[[], L.LightningModule] = made
    return ParityCase(kind.__name__, str(kind.__doc__), build, options)  # type: ignore[arg-type]
