"""Keeps Lightning quiet: what is compared is numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import lightning.pytorch as pl  # sets the levels of its loggers when it is imported
import pytest


@pytest.fixture(scope="session", autouse=True)
def quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (pl.__name__, "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
