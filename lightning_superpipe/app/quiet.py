"""Leaves out what Lightning says on every run about hardware that is not there and products that are not installed."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quieten"]

_REPEATED = ("GPU available", "TPU available", "HPU available", "💡 Tip", "`Trainer(limit_")
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def quieten() -> None:
    """Leave it out from now on; what is about this run is still said."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_about_this_run)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _is_about_this_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REPEATED)
