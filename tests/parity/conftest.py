"""Keeps the parity tests quiet; what is compared is numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def _device(request: pytest.FixtureRequest) -> None:
    """Build the emulated device for the cases that run there."""
    if request.node.callspec.params["device"] == "emu":
        request.getfixturevalue("emu")
