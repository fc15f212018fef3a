"""Stepping aside: where all that the ordinary run holds fits on the device, streaming ends and that run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.knobs import may_step_aside
from lightning_superpipe.moving import bring_home, move_to_device
from lightning_superpipe.planning.aside import OrdinaryNeed, ordinary_need
from lightning_superpipe.rewind import OutOfDeviceMemory, let_go_of_memory
from lightning_superpipe.tuning import Tuner

__all__ = ["AsideRule", "move_as_it_fits"]


class AsideRule:
    """Says when a run may go on without streaming.

    Args:
        sizes: returns the bytes of the whole model's weights, gradients and optimizer states.
        tell: says something to the user.
    """

    def __init__(
        self,
        config: SuperpipeConfig,
        tuner: Tuner,
        sizes: Callable[[], tuple[int, int, int]],
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._tuner, self._sizes, self._tell = config, tuner, sizes, tell
        self._is_open = may_step_aside(config)

    def due(self, num_steps: int, *, is_safe: Callable[[], bool]) -> OrdinaryNeed | None:
        """Return what the ordinary run will hold, if it is to go on from here; None if streaming goes on.

        Args:
            num_steps: that have run.
            is_safe: returns whether nobody can hold tensors that this would leave behind on the host; asked once.
        """
        choice, setting, record = self._tuner.choice, self._tuner.setting, self._config.record_step
        if not self._is_open or choice is None or (record is not None and num_steps <= record):
            return None
        if setting.k != choice.setting.k or set(setting.activations) != {"keep"}:
            return None  # not in force, or not any more
        need = ordinary_need(choice, *self._sizes())
        if need is None or self._config.step_aside is True or is_safe():
            return need
        self._is_open = False
        self._tell(
            f"superpipe: {need}, so streaming is not worth it. Here it goes on all the same, because code of your own "
            "may hold tensors that are on the host now: with step_aside=True the run goes on as without superpipe."
        )
        return None


def move_as_it_fits(root: nn.Module, optimizers: Sequence[Optimizer], device: torch.device, need: OrdinaryNeed) -> None:
    """Move all that the ordinary run holds to the device.

    Raises:
        OutOfDeviceMemory: there is less room than was known; all is on the host.
    """
    let_go_of_memory(device)
    try:
        move_to_device(root, optimizers, device)
    except torch.OutOfMemoryError as error:
        bring_home(root, optimizers)
        raise OutOfDeviceMemory(
            f"{need}, by what was known of it, but there was no room: {error} Streaming has ended, and the model is on "
            "the host with all of the last finished step. Set step_aside=False to let it stream."
        ) from error
