"""Which knobs the options leave open, and what a run begins with."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.activations import Activations
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.planning.budget import AUTO_K, MemoryNeed, choose_k, choose_residents
from lightning_superpipe.planning.choose import Asked
from lightning_superpipe.planning.workload import Setting

__all__ = ["asked_of", "first_setting", "may_step_aside", "most_slots", "refuse_announced"]


def asked_of(
    config: SuperpipeConfig,
    setting: Setting,
    activations: Activations,
    order: Sequence[int],
    *,
    has_limit: bool,
    shares_memory: bool,
) -> Asked:
    """Return what a choice must keep: a knob that is not open stays as the setting has it.

    Residents, policies and micro-batches are open only under a limit: without one, nothing says when to stop.

    Args:
        order: units by their use, in which policies count.
        has_limit: it is known how much the device has.
        shares_memory: the device is the host.
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
        micro_batches=None if is_limited and config.micro_batches == "auto" else setting.micro_batches,
        update=setting.update,
        update_on_device=setting.update_on_device,
        most_slots=None if has_limit else most_slots(config, shares_memory=shares_memory),
    )


def most_slots(config: SuperpipeConfig, *, shares_memory: bool) -> int | None:
    """Return how many slots are wanted at most where no limit says so; None for any number.

    Weights that lie in files are not to fill the memory that they were kept out of, where the device is the host.
    """
    return AUTO_K if shares_memory and config.is_on_disk("weights") else None


def may_step_aside(config: SuperpipeConfig) -> bool:
    """Whether a run may go on without streaming: it is allowed, and nothing was asked for that only streaming gives."""
    return config.step_aside is not False and not config.needs_streaming


def first_setting(config: SuperpipeConfig, need: MemoryNeed, budget: int | None) -> Setting:
    """Return what a run begins with, as long as nothing has been measured.

    Raises:
        BudgetError: not even the smallest window fits.
    """
    k_prime = 1 if config.k_prime == "auto" else config.k_prime
    k = choose_k(None if config.k == "auto" else config.k, need, budget, k_prime=k_prime)
    resident = choose_residents(0 if config.resident == "auto" else config.resident, k, need, budget, need.total(k))
    share = 0.0 if config.update_on_device == "auto" else float(config.update_on_device)
    parts = config.first_micro_batches
    return Setting(k, min(k_prime, k), resident, micro_batches=parts, update_on_device=share)


def refuse_announced(config: SuperpipeConfig) -> None:
    """Refuse, in loops that do not announce their steps, what needs that.

    Raises:
        UnsupportedError: units were to be updated in backward.
    """
    if config.update == "in_backward":
        raise UnsupportedError(
            "update='in_backward' needs a loop that announces its steps: Lightning's Trainer with automatic "
            "optimization. In a loop of your own leave update out, and put backward and step into `with "
            "pipe.updating(optimizer):`. Or use update='after_backward', which is exact as well and hides the "
            "update under the next forward."
        )
