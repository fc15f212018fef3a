"""When streaming is not worth it: all that the ordinary run holds fits on the device."""

from __future__ import annotations

from dataclasses import dataclass

from humanize import naturalsize

from lightning_superpipe.planning.choose import Choice

__all__ = ["OrdinaryNeed", "ordinary_need"]


@dataclass(frozen=True)
class OrdinaryNeed:
    """Device bytes of the ordinary run.

    Attributes:
        weights: of the whole model, buffers included.
        gradients: of all that is trained.
        states: of the optimizers.
        beside: activations, or what the update takes meanwhile, whichever is more.
        allowed: what there is.

    >>> print(OrdinaryNeed(1024, 1024, 2048, 512, allowed=8192))
    weights, gradients, optimizer states and activations fit on the device, 4.5 KiB of 8.0 KiB
    """

    weights: int
    gradients: int
    states: int
    beside: int
    allowed: int

    @property
    def total(self) -> int:
        """All kinds together, bytes."""
        return self.weights + self.gradients + self.states + self.beside

    def __str__(self) -> str:
        kinds = "weights, gradients, optimizer states" if self.gradients else "weights"
        sizes = (naturalsize(size, binary=True) for size in (self.total, self.allowed))
        return f"{kinds} and activations fit on the device, {' of '.join(sizes)}"


def ordinary_need(choice: Choice, weights: int, gradients: int, states: int) -> OrdinaryNeed | None:
    """Return what the ordinary run would hold; None where that does not fit, or nobody knows what does.

    Optimizers that update many tensors at once take about as much again as the gradients for what they compute
    (torch.optim, ``foreach``).

    Args:
        choice: of a setting, from the same step.
        weights, gradients, states: of the whole model, bytes.
    """
    allowed = choice.limits.device_bytes
    if allowed is None or not choice.fits_whole:
        return None
    need = OrdinaryNeed(weights, gradients, states, max(choice.need.activations, gradients), allowed)
    return need if need.total <= allowed else None
