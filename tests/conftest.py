"""What every test runs under: a seed, quiet libraries, no downloads, and the emulated device for tests that ask."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
from collections.abc import Iterator

# Read by the libraries when they are imported, so set before any of them is.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from their configurations, never downloaded
os.environ["SUPERPIPE_CACHE"] = tempfile.mkdtemp(prefix="superpipe-tests-")  # no test sees a profile of the user's

import pytest
import torch

import tests.emu

# Noise that says nothing about this package. Everything else is shown in pytest's summary.
_IGNORED_WARNINGS = [
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*number of training batches:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*LeafSpec.*:DeprecationWarning",
    "ignore:.*GPU available but not used.*:UserWarning",
    "ignore:.*logger. as the default:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in _IGNORED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the mark `emu` and the fixture `emu` mean the same."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if "emu" in item.fixturenames:
            item.add_marker("emu")
        elif item.get_closest_marker("emu"):
            # A new list: the old one is shared with the same test on other devices.
            item.fixturenames = ["emu", *item.fixturenames]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load the device before the first test: the first backward pass starts autograd's threads, one per device."""
    if any(item.get_closest_marker("emu") for item in session.items) and not session.config.option.collectonly:
        with contextlib.suppress(tests.emu.EmuUnavailable):  # the fixture says it
            tests.emu.load()


@pytest.fixture(scope="session")
def emu() -> torch.device:
    """The emulated device; a test that asks for it is skipped, with the reason, where it cannot be built."""
    try:
        return tests.emu.load()
    except tests.emu.EmuUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unlimited_emu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take a capacity back that a failed test left behind."""
    yield
    if "emu" in request.fixturenames and tests.emu.is_loaded():
        tests.emu.set_capacity(None)
