"""Where machine profiles are found: the user's cache, files, and those that come with the package."""

from __future__ import annotations

import importlib.resources
import os
import warnings
from importlib.resources.abc import Traversable
from pathlib import Path

import torch

from lightning_superpipe.errors import ConfigError, SuperpipeError, SuperpipeWarning
from lightning_superpipe.observe.identity import Identity, identify
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.rates import Route
from lightning_superpipe.option_checks import nearest

__all__ = ["CACHE_VARIABLE", "cached_profile", "find_profile", "keep_profile", "known_machine", "shipped_names"]

CACHE_VARIABLE = "SUPERPIPE_CACHE"
"""Environment variable that names another folder for measured profiles."""


def cached_profile(here: Identity, folder: Path | None = None) -> MachineProfile | None:
    """Return the profile that was measured on this machine; None if there is none that still holds.

    A file that holds something else is renamed, so that nothing is lost, and said; so is a profile of another driver or
    version.

    Args:
        here: the machine as it is now.
        folder: of the cache; None takes the user's.
    """
    path = _cache_path(here, folder)
    try:
        profile = MachineProfile.load(path)
    except OSError:
        return None
    except SuperpipeError as error:
        _say(f"{error} It is now called {_put_aside(path)}.")
        return None
    if stale := profile.why_stale(here):
        _say(f"the profile of this machine in {str(path)!r} no longer holds: {stale}.")
        return None
    return profile


def known_machine(device: torch.device, *, is_emulated: bool) -> MachineProfile | None:
    """Return what was measured of this machine with one of its devices, if copies were; measures nothing.

    Args:
        is_emulated: copies are slowed down to a link that the machine does not have.
    """
    profile = None if is_emulated else cached_profile(identify(device))
    return profile if profile is not None and profile.copy_curve(Route.H2D) and profile.copy_curve(Route.D2H) else None


def keep_profile(profile: MachineProfile, folder: Path | None = None) -> Path | None:
    """Write a measured profile to the cache; return its file, or None, with a warning, where that cannot be."""
    path = _cache_path(profile.identity, folder)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(beside)
        os.replace(beside, path)  # two processes may measure at once: each leaves a whole file
    except OSError as error:
        _say(
            f"the machine's profile cannot be kept in {str(path.parent)!r} ({error.strerror or error}), so the next "
            f"run measures again. Set {CACHE_VARIABLE} to a folder that can be written."
        )
        return None
    return path


def find_profile(name: str, here: Identity | None = None) -> MachineProfile:
    """Return the profile in a file, or one of those that come with the package by its name.

    Args:
        name: a path that ends in ``.json``, or a name of ``shipped_names``.
        here: the machine that it must be of, as it is now; None takes any machine's.

    Raises:
        ConfigError: there is no such profile, it is of another format, or it is stale.
    """
    source: Path | Traversable = Path(name)
    if not name.endswith(".json"):
        source = _shipped() / f"{name}.json"
        if not source.is_file():
            raise ConfigError(
                f"device={name!r}: there is no such profile; {nearest(name, shipped_names())} Profiles that come with "
                f"the package: {', '.join(shipped_names())}. Of your own machine: superpipe profile output=FILE.json, "
                "then device=FILE.json."
            )
    try:
        profile = MachineProfile.read(source)
    except OSError as error:
        raise ConfigError(f"device={name!r} cannot be read: {error.strerror}. Measure: superpipe profile.") from error
    except SuperpipeError as error:
        raise ConfigError(str(error)) from error
    if here is not None and (stale := profile.why_stale(here)):
        raise ConfigError(
            f"the profile {name!r} is not one of this machine as it is now: {stale}. Measure again: superpipe profile "
            "--again."
        )
    return profile


def shipped_names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in _shipped().iterdir() if entry.name.endswith(".json"))


def _shipped() -> Traversable:
    return importlib.resources.files(__package__) / "machines"


def _cache_path(here: Identity, folder: Path | None) -> Path:
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(os.environ.get(CACHE_VARIABLE) or Path(base, "lightning_superpipe"))
    return folder / f"machine-{here.key}.json"


def _put_aside(path: Path) -> str:
    """Rename a file that holds something else, to a name that was free; return the name, or the old one if it stays."""
    for number in range(1, 100):
        aside = path.with_name(f"{path.stem}.corrupt-{number}.json")
        if not aside.exists():
            try:
                return path.rename(aside).name
            except OSError:
                break
    return path.name


def _say(words: str) -> None:
    warnings.warn(words, SuperpipeWarning, stacklevel=3)
