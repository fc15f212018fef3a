"""Every error that a user can meet, in one tree.

Each message says what was asked, the numbers, which unit, and what to do. Errors about a value are also ``ValueError``;
errors about a situation are also ``RuntimeError``, so that code which knows nothing of this package still catches them.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "ConfigError",
    "PartitionError",
    "PlanError",
    "SuperpipeError",
    "SuperpipeWarning",
    "TransferError",
    "UnsupportedError",
]


class SuperpipeError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(SuperpipeError, ValueError):
    """An option has an unknown name, a wrong type, or an impossible value."""


class PartitionError(SuperpipeError, ValueError):
    """The model cannot be divided into units as asked."""


class PlanError(SuperpipeError, ValueError):
    """A plan breaks a rule: the message shows the plan and marks the guilty action."""


class BudgetError(SuperpipeError, RuntimeError):
    """The device or host memory allowed is smaller than what the plan needs."""


class UnsupportedError(SuperpipeError, RuntimeError):
    """A combination that cannot work, refused before anything ran."""


class TransferError(SuperpipeError, RuntimeError):
    """A copy between host and device failed; the message names the unit."""


class SuperpipeWarning(UserWarning):
    """Something works, but slower or larger than it could."""
