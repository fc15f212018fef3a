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
    ConfigError,
    PartitionError,
    SuperpipeError,
    UnsupportedError,
)
from tests.lightning.stories import Originals, assert_refused, assert_usable
from tests.parity.harness import trainer
from tests.parity.probe import WIDTH, Block, ProbeModule, fixed_batches

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: an integer of at least 1"),
        ({"k": 2, "k_prime": 3}, "k_prime=3 is larger than k=2"),
        ({"k": 2, "k_prime": 0}, "k_prime=0: an integer of at least 1"),
        ({"k_primes": 2}, "unknown option 'k_primes': did you mean 'k_prime'"),
        ({"device_memroy": "1GiB"}, "unknown option 'device_memroy': did you mean 'device_memory'"),
        ({"colour": 2}, "unknown option 'colour': known options: k, k_prime"),
        ({"device_memory": "lots"}, "'lots' is not a size"),
    ],
)
def test_bad_options_are_refused_when_the_strategy_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SuperpipeStrategy(**options)


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
