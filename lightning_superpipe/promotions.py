"""What users are told where parameters turn out to be read outside their unit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from humanize import naturalsize

from lightning_superpipe.engine.catalog import Promotion
from lightning_superpipe.errors import BudgetError, SuperpipeWarning

__all__ = ["report_promotions"]

_MOST_NAMES = 8


def report_promotions(promotions: Sequence[Promotion], *, need_bytes: int, budget_bytes: int | None) -> None:
    """Warn of parameters that have become anchors.

    Args:
        need_bytes: what the window needs on the device without them.
        budget_bytes: what it may take; None for any number.

    Raises:
        BudgetError: they are too much.
    """
    if not promotions:
        return
    num_bytes = sum(promotion.num_bytes for promotion in promotions)
    names = ", ".join(sorted({promotion.unit_name for promotion in promotions})[:_MOST_NAMES])
    message = (
        f"{len(promotions)} parameters ({naturalsize(num_bytes, binary=True)}) of units {names} are read outside "
        f"their unit (by {promotions[0].function}): from now on they have a permanent copy on the device."
    )
    extra = need_bytes + num_bytes
    if budget_bytes is not None and extra > budget_bytes:
        raise BudgetError(
            f"{message} That makes {naturalsize(extra, binary=True)} ({extra} bytes), but device_memory allows "
            f"{naturalsize(budget_bytes, binary=True)} ({budget_bytes} bytes). Read them inside a "
            "module's own forward, or allow more."
        )
    warnings.warn(message, SuperpipeWarning, stacklevel=3)
