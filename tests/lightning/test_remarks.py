"""What users are told at setup, once: that streaming is only emulated, and when it cannot pay."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from lightning_utilities.core import rank_zero as rank_zero_module
from torch import nn

from lightning_superpipe import SuperpipeStrategy
from tests.parity.harness import trainer
from tests.parity.probe import Block, Device, ProbeModule

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What this package said, as the log is written, whatever earlier tests did to logging."""
    lines: list[str] = []
    monkeypatch.setattr(rank_zero_module.rank_zero_only, "rank", 0, raising=False)
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("superpipe:"):
                lines.append(record.getMessage())

    # The one of Lightning's two namespaces that was imported last: both write there.
    logger: logging.Logger = rank_zero_module.log
    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
    logging.disable(disabled)


def run(strategy: SuperpipeStrategy, device: Device = "cpu", module: Any = None) -> None:
    made = trainer(device, strategy, max_epochs=1)
    made.fit(module or ProbeModule())
    made.validate(module or ProbeModule(), verbose=False)


def test_a_machine_without_accelerator_is_told_that_streaming_is_emulated(said: list[str]) -> None:
    run(SuperpipeStrategy(k=2))
    (line,) = said
    assert "no accelerator" in line and "emulated" in line and "cannot pay" not in line
    assert "2 units at a time" in line and "8.6 KiB" in line and "18.4 KiB" in line


def test_weights_in_files_without_accelerator_are_not_called_an_emulation(said: list[str]) -> None:
    run(SuperpipeStrategy(k=2, store="disk"))
    (line,) = said
    assert "no accelerator" in line and "emulated" not in line
    assert "2 units at a time are in memory (8.6 KiB" in line and "of weights in files" in line
    run(SuperpipeStrategy(k=2, store="disk", link={"h2d_gb_s": 1.0}))
    assert "emulated" in said[-1]


@pytest.mark.emu
def test_a_real_device_says_nothing_if_streaming_pays(said: list[str]) -> None:
    run(SuperpipeStrategy(k=2), "emu")
    assert said == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("emu", marks=pytest.mark.emu)])
def test_streaming_that_cannot_pay_is_pointed_out_with_the_numbers(device: Device, said: list[str]) -> None:
    run(SuperpipeStrategy(k=99), device)
    (line,) = said
    assert "streaming cannot pay" in line and "6 slots" in line and "'blocks.0'" in line
    assert "smaller k" in line and "units=" in line
    assert ("emulated" in line) == (device == "cpu")


class Lopsided(ProbeModule):
    """One unit is most of the model."""

    def build(self) -> None:
        self.blocks = nn.ModuleList([Block(), Block()])
        self.large = nn.Linear(16, 900)

    def trunk(self, x: Any) -> Any:
        return super().trunk(x) + self.large(x).mean(-1, keepdim=True)


def test_a_single_large_unit_is_named(said: list[str]) -> None:
    run(SuperpipeStrategy(k=2), module=Lopsided())
    (line,) = said
    assert "the largest unit ('large')" in line


class Tied(ProbeModule):
    """Much of it is an anchor."""

    def build(self) -> None:
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 16)
        self.head.weight = self.embed.weight


def test_anchors_count_as_well(said: list[str]) -> None:
    run(SuperpipeStrategy(k=3), module=Tied())
    (line,) = said
    assert "1.0 KiB of anchors" in line


def test_it_is_said_once_for_a_strategy_and_again_for_another_model(said: list[str]) -> None:
    strategy = SuperpipeStrategy(k=2)
    made = trainer("cpu", strategy, max_epochs=1)
    for module in (ProbeModule(), ProbeModule()):
        made.fit(module)
        made.validate(module, verbose=False)
    assert len(said) == 1
    made.fit(Lopsided())
    assert len(said) == 2
