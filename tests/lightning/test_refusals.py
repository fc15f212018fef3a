"""Bad input is refused before the first step with a clear message, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import FSDPPrecision, Precision
from torch import Tensor, nn

from lightning_superpipe import SuperpipeStrategy
from lightning_superpipe.errors import (
    BudgetError,
    ConfigError,
    PartitionError,
    SuperpipeError,
    SuperpipeWarning,
    UnsupportedError,
)
from tests.lightning.stories import Originals
from tests.parity.harness import trainer
from tests.parity.probe import WIDTH, Block, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_refused(module: L.LightningModule, strategy: SuperpipeStrategy, message: str, **options: Any) -> str:
    """Fit, expect a refusal before any batch, and train the same module with the same data afterwards."""
    originals = Originals(module)
    before = {name: value.clone() for name, value in module.state_dict().items()} if _copies(module) else {}
    with pytest.raises(SuperpipeError, match=message) as caught:
        trainer("cpu", strategy, max_epochs=1, **options).fit(module)
    originals.assert_kept()
    assert getattr(module, "losses", []) == [], "refused too late"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if name in before)
    assert isinstance(caught.value, RuntimeError | ValueError), "code that knows nothing of us catches it too"
    return str(caught.value)


def _copies(module: nn.Module) -> bool:
    return all(parameter.layout is torch.strided and not parameter.is_quantized for parameter in module.parameters())


def assert_usable(module: ProbeModule, **options: Any) -> None:
    """Raise unless the module trains as a fresh one would."""
    trainer("cpu", SuperpipeStrategy(k=2), max_epochs=1, **options).fit(module)
    assert len(module.losses) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: an integer of at least 1"),
        ({"k": 2, "k_prime": 3}, "k_prime=3 is larger than k=2"),
        ({"k": 2, "k_prime": 0}, "k_prime=0: an integer of at least 1"),
        ({"k_primes": 2}, "unknown option 'k_primes': did you mean 'k_prime'"),
        ({"device_memroy": "1GiB"}, "unknown option 'device_memroy': did you mean 'device_memory'"),
        ({"strategy": 2}, "unknown option 'strategy': known options: k, k_prime"),
        ({"device_memory": "lots"}, "'lots' is not a size"),
    ],
)
def test_bad_options_are_refused_when_the_strategy_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SuperpipeStrategy(**options)


# -- the budget. ProbeModule: six units, the largest a block of 4,416 bytes in a slot of 5,120 (each tensor aligned).

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


# -- modules that cannot be streamed


class Single(ProbeModule):
    """Owns its only parameter itself."""

    def build(self) -> None:
        del self.embed, self.blocks, self.head
        self.weight = nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Nothing(ProbeModule):
    """Has no parameters."""

    def build(self) -> None:
        del self.embed, self.blocks, self.head

    def configure_optimizers(self) -> None:
        return None


def test_a_module_without_units_is_told_where_to_put_its_layers() -> None:
    assert_refused(Single(), SuperpipeStrategy(), r"no units found in Single.*Put the layers into child modules")
    assert_refused(Nothing(), SuperpipeStrategy(), "Nothing owns no parameters, so there is nothing to stream")
    module = Single()
    trainer("cpu", max_epochs=1).fit(module)
    assert len(module.losses) == 4


def test_a_name_that_matches_no_module_is_answered_with_the_nearest() -> None:
    module = ProbeModule()
    message = assert_refused(module, SuperpipeStrategy(units=["Blok"]), "Blok")
    assert "Block" in message
    with pytest.raises(PartitionError):
        trainer("cpu", SuperpipeStrategy(units="blocks.9")).validate(module)
    assert_usable(module)


class Odd(ProbeModule):
    """Holds one parameter of an odd kind."""

    kind = ""

    def build(self) -> None:
        value: Any = torch.ones(WIDTH, WIDTH)
        if self.kind == "fp8":
            value = value.to(torch.float8_e4m3fn)
        elif self.kind == "quantised":
            value = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        elif self.kind == "sparse":
            value = value.to_sparse()
        self.blocks[1].odd = nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fp8", r"'blocks.1.odd' is quantised \(Parameter, torch.float8_e4m3fn\).*bfloat16"),
        ("quantised", r"'blocks.1.odd' is quantised \(Parameter, torch.qint8\).*bfloat16"),
        ("sparse", r"'blocks.1.odd' is sparse.*to_dense"),
    ],
)
def test_parameters_that_are_no_plain_numbers_are_named(kind: str, message: str) -> None:
    made = type("Odd", (Odd,), {"kind": kind})()
    assert_refused(made, SuperpipeStrategy(), message)
    del made.blocks[1].odd
    assert_usable(made)


# -- devices


def test_several_devices_are_refused_with_the_way_to_pick_one() -> None:
    module = ProbeModule()
    message = assert_refused(module, SuperpipeStrategy(), "one device, but the trainer has 2", devices=2)
    assert "Trainer(devices=1)" in message and "devices=[i]" in message
    given = SuperpipeStrategy(parallel_devices=[torch.device("cpu"), torch.device("cpu")])
    assert_refused(module, given, r"has 2 \(cpu, cpu\)")
    assert_usable(module)


class TwoDevices(CPUAccelerator):
    """Says that there are two, as a machine with two accelerators does for devices='auto'."""

    @staticmethod
    def auto_device_count() -> int:
        return 2


def test_all_devices_of_a_machine_are_refused_too() -> None:
    run = L.Trainer(accelerator=TwoDevices(), strategy="superpipe", logger=False, enable_checkpointing=False)
    with pytest.raises(UnsupportedError, match="the trainer has 2"):
        run.fit(ProbeModule())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 2}, "num_nodes=2.*Use num_nodes=1"),
        ({"sync_batchnorm": True}, "sync_batchnorm=True.*Leave it out"),
    ],
)
@pytest.mark.parametrize("strategy", ["superpipe", "object"])
def test_clusters_are_refused_when_the_trainer_is_made(options: dict[str, Any], message: str, strategy: str) -> None:
    made: Any = strategy if strategy == "superpipe" else SuperpipeStrategy()
    with pytest.raises(UnsupportedError, match=message):
        L.Trainer(accelerator="cpu", strategy=made, logger=False, **options)


class Elsewhere(CPUAccelerator):
    """Drives a device that this machine does not have."""

    kind = "mps"

    def setup_device(self, device: torch.device) -> None:
        pass

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("mps", 0)]


def test_mps_is_refused_because_it_shares_the_hosts_memory() -> None:
    module = ProbeModule()
    originals = Originals(module)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(UnsupportedError, match=r"'mps' saves nothing.*shares its memory.*ordinary strategy"):
        L.Trainer(accelerator=Elsewhere(), devices=1, strategy=SuperpipeStrategy(), **quiet).fit(module)
    originals.assert_kept()
    assert_usable(module)


@pytest.mark.emu
def test_a_link_can_be_emulated_only_where_copies_are() -> None:
    strategy = SuperpipeStrategy(link={"h2d_gb_s": 5})
    trainer("emu", strategy, max_epochs=1).fit(ProbeModule())
    assert strategy.report().num_loads > 0


# -- precision plugins


def named(name: str) -> type[Precision]:
    return type(name, (Precision,), {})


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (named("TransformerEnginePrecision"), "stateful fp8"),
        (named("BitsandbytesPrecision"), "quantised"),
        (type("Own", (named("BitsandbytesPrecision"),), {}), "quantised"),
        (named("DeepSpeedPrecision"), "DeepSpeed"),
        (lambda: FSDPPrecision("bf16-mixed"), "FSDP"),
    ],
    ids=["transformer_engine", "bitsandbytes", "subclass", "deepspeed", "fsdp"],
)
def test_precision_plugins_that_cannot_work_are_refused(plugin: Callable[[], Precision], reason: str) -> None:
    module = ProbeModule()
    message = assert_refused(
        module, SuperpipeStrategy(), f"cannot be used with superpipe.*{reason}", plugins=[plugin()]
    )
    assert "'bf16-mixed'" in message
    assert_usable(module)


def test_refused_runs_leave_the_trainer_usable() -> None:
    strategy = SuperpipeStrategy(k=2)
    run = trainer("cpu", strategy, max_epochs=1)
    with pytest.raises(PartitionError):
        run.fit(Single())
    with pytest.raises(SuperpipeError, match="nothing has run yet"):
        strategy.report()
    module = ProbeModule()
    run.fit(module)
    assert len(module.losses) == 4 and strategy.report().num_loads > 0
    assert isinstance(module.blocks[0], Block) and type(module.blocks[0]) is Block


def test_stages_without_data_are_refused_by_the_trainer_as_ever() -> None:
    class NoData(ProbeModule):
        val_dataloader: Any = None

    module = NoData()
    originals = Originals(module)
    with pytest.raises(Exception, match="dataloader"):
        trainer("cpu", SuperpipeStrategy()).validate(module)
    originals.assert_kept()
    trainer("cpu", SuperpipeStrategy(), max_epochs=1).fit(module, fixed_batches(2))
    assert len(module.losses) == 2
