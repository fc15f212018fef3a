"""What went wrong, in a paragraph: what was asked, what is allowed, what to do."""

from __future__ import annotations

import re
from dataclasses import fields

import torch
from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import Container, DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_superpipe.app.groups import GROUPS
from lightning_superpipe.config import Adversary, Disk, Link
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.option_checks import nearest

__all__ = ["explain"]

_NESTED = {
    f"superpipe.{name}": tuple(field.name for field in fields(schema))
    for name, schema in (("disk", Disk), ("link", Link), ("adversary", Adversary))
}


def explain(error: BaseException) -> str | None:
    """Return a paragraph for an error that a user can mend; None for all others, whose traceback is needed.

    >>> explain(SuperpipeError("k=9 does not fit."))
    'k=9 does not fit.'
    """
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, torch.OutOfMemoryError) and not isinstance(error, SuperpipeError):
        return f"the device's memory is full: {error}\nUse a smaller superpipe.k or a smaller batch."
    if isinstance(error, CompactHydraException):
        return _composition(error)
    if isinstance(error, OmegaConfBaseException):
        said = f"`{error.full_key}`: {_first_line(error)}" if error.full_key else _first_line(error)
        return f"{said}{_missing_group(said)}"
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"{error}: choose one of its files, as `superpipe --help` lists them."
    if isinstance(error, SuperpipeError | MisconfigurationException | FileNotFoundError | PermissionError):
        return str(error)
    return None


def _instantiation(error: InstantiationException) -> str:
    """Return why an object could not be made: the words of the innermost cause, and the key."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if isinstance(causes[-1], SuperpipeError):
        return str(causes[-1])
    what = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", ".")
    return f"{what}\n{causes[-1]}" if len(causes) > 1 else what


def _composition(error: CompactHydraException) -> str:
    """Return what is wrong with the overrides or the files."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and "not in struct" in str(cause):
        return _unknown_key(str(cause.full_key), cause.parent_node)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        hint = nearest(option, error.options)
        return f"unknown option {group}={option}: {hint}\n{group}: {', '.join(error.options)}"
    return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)


def _unknown_key(key: str, parent: Container | None) -> str:
    """Return what is known beside a key that is not."""
    above, _, last = key.rpartition(".")
    names = [str(name) for name in parent or ()] if isinstance(parent, DictConfig) else []
    if above and not names:
        known = f" It takes {', '.join(_NESTED[above])}." if above in _NESTED else ""
        return f"{key!r}: {above} is null; give it as a whole, as in '{above}={{{last}: ...}}'.{known}"
    if not above:
        names = [*GROUPS, *(name for name in names if name not in GROUPS and name != "hydra")]
    return f"unknown key {key!r}: {nearest(last, names, prefix=f'{above}.' if above else '')}"


def _missing_group(said: str) -> str:
    """Return what to add where a value is taken from a group that nobody chose."""
    found = re.search(r"Interpolation key '(\w+)\.", said)
    if found is None or found[1] not in GROUPS:
        return ""
    return f"\nNo {found[1]} was chosen: add {found[1]}=NAME, or take experiment=NAME (superpipe --help lists them)."


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
