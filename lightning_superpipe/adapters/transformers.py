"""transformers: ``SuperpipeTrainer``, and a mixin for every class derived from ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from lightning_superpipe.adapters.accelerate import SuperpipeAccelerator, config_of, enable
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.observe.report import Report

if TYPE_CHECKING:
    _Base: Any
else:
    _Base = object

__all__ = ["SuperpipeTrainer", "SuperpipeTrainerMixin"]

_REFUSED = {
    "fp16_full_eval": "it moves the whole model to the device",
    "bf16_full_eval": "it moves the whole model to the device",
    "torch_compile": "it wraps the whole model; compile the units instead",
}


class SuperpipeTrainerMixin(_Base):  # type: ignore[misc]  # stands before a Trainer class
    """Streams the model of the Trainer class before which it stands.

    ::

        class Mine(SuperpipeTrainerMixin, Seq2SeqTrainer): ...

    Args:
        superpipe: options of :class:`~lightning_superpipe.SuperpipeConfig`, as one or as a mapping.
        arguments: those of the Trainer class.

    Raises:
        ConfigError: an option is unknown or impossible.
        UnsupportedError: training arguments that cannot be combined with streaming, by name.
    """

    def __init__(
        self, *arguments: Any, superpipe: SuperpipeConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.superpipe = config_of(superpipe)
        super().__init__(*arguments, **options)

    def create_accelerator_and_postprocess(self) -> None:
        """Let the Trainer make its accelerator, and turn it into one that streams."""
        for name, reason in _REFUSED.items():
            if getattr(self.args, name, False):
                raise UnsupportedError(f"TrainingArguments({name}=True) cannot be used with superpipe: {reason}.")
        super().create_accelerator_and_postprocess()
        enable(self.accelerator, self.superpipe)
        self.args._n_gpu = min(self.args.n_gpu, 1)  # or the Trainer would wrap the model in DataParallel

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model on the host: it streams to the device."""

    def superpipe_report(self) -> Report:
        """What streaming cost and saved.

        Raises:
            SuperpipeError: nothing has run yet.
        """
        accelerator: SuperpipeAccelerator = self.accelerator
        return accelerator.report()


class SuperpipeTrainer(SuperpipeTrainerMixin, Trainer):
    """``transformers.Trainer`` with a streamed model; takes ``superpipe=dict(k=4, k_prime=2)`` besides."""


_SEAMS = ("create_accelerator_and_postprocess", "_move_model_to_device")
_missing = [name for name in _SEAMS if not hasattr(Trainer, name)]
if _missing:
    raise ImportError(
        f"this version of transformers has no Trainer.{_missing[0]}, which superpipe overrides: "
        "install transformers>=5,<6."
    )
