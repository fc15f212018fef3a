"""Which knobs the options leave open."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.activations import Activations
from lightning_superpipe.planning.choose import Asked
from lightning_superpipe.planning.workload import Setting

__all__ = ["asked_of"]


def asked_of(
    config: SuperpipeConfig, setting: Setting, activations: Activations, order: Sequence[int], *, has_limit: bool
) -> Asked:
    """Return what a choice must keep: a knob that is not open stays as the setting has it.

    Residents and policies are open only under a limit: without one, nothing says when to stop.

    Args:
        order: units by their use, in which policies count.
        has_limit: it is known how much the device has.
    """
    opens_k = config.k == "auto"
    is_limited = config.device_memory is not None or (opens_k and has_limit)
    opens_resident = config.resident == "auto" and (opens_k or is_limited)
    policies = [None if is_limited and activations.is_open(unit) else setting.policy(unit) for unit in order]
    return Asked(
        k=None if opens_k else setting.k,
        k_prime=None if opens_k and config.k_prime == "auto" else setting.k_prime,
        resident=None if opens_resident else setting.resident,
        activations=tuple(policies),
        update=setting.update,
        update_on_device=setting.update_on_device,
    )
