"""``superpipe profile``: measures this machine, prints what it found, and keeps it for the next time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console

from lightning_superpipe.errors import ConfigError, SuperpipeError, SuperpipeWarning
from lightning_superpipe.forecast.machine import machine_profile, profile_machine
from lightning_superpipe.observe import keep_profile
from lightning_superpipe.observe.machine_table import profile_tables
from lightning_superpipe.option_checks import nearest

__all__ = ["PROFILE_USAGE", "print_profile"]

PROFILE_USAGE = "superpipe profile [device=cuda] [disk=FOLDER] [output=FILE.json] [--again]"


@dataclass(frozen=True)
class _Words:
    """What was asked; each is a word ``name=value``, or ``--name value``."""

    device: str | None = None
    disk: str | None = None
    output: str | None = None
    again: str | None = None


def print_profile(words: Sequence[str]) -> None:
    """Print the profile of this machine; measure it where none was kept, or one with a disk is asked for.

    Raises:
        ConfigError: a word means nothing here.
        SuperpipeError: something cannot be measured or written.
    """
    asked = _parse(words)
    again = asked.again not in (None, "false")
    console = Console()
    with warnings.catch_warnings(record=True) as said, console.status("Measuring this machine") as status:
        warnings.simplefilter("always", SuperpipeWarning)

        def say(what: str) -> None:
            status.update(f"Measuring this machine: {what}")

        device = None if asked.device is None else _device(asked.device)
        if asked.disk is None:
            profile = machine_profile(device, again=again, say=say)
        else:
            profile = profile_machine(device, disk=asked.disk, say=say)
            keep_profile(profile)
    for warning in said:
        console.print(str(warning.message), highlight=False)
    console.print(profile_tables(profile), highlight=False)
    if asked.output is not None:
        try:
            profile.save(Path(asked.output))
        except OSError as error:
            raise SuperpipeError(f"output={asked.output!r} cannot be written: {error.strerror}.") from error
        console.print(f"Written to {asked.output}", highlight=False)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} is not a device of this machine: {str(error).splitlines()[0]}") from error
    return device


def _parse(words: Sequence[str]) -> _Words:
    known = [field.name for field in fields(_Words)]
    found: dict[str, str] = {}
    for name, value in _pairs(words):
        if name not in known:
            raise ConfigError(f"{name!r}: {nearest(name, known)} Usage: {PROFILE_USAGE}")
        if value is None:
            raise ConfigError(f"{name} needs a value: {name}=... Usage: {PROFILE_USAGE}")
        found[name] = value
    return _Words(**found)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if equals:
            yield name, value
        elif name == "again":
            yield name, "true"
        elif word.startswith("--") and rest:
            yield name, rest.pop(0)
        else:
            yield name, None
