"""Every optimizer of torch that keeps per-parameter state, on host parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.probe import CASES, ParityCase, ProbeModule

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# The for-loop kernels, where there is a choice, are the same code on every device.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "foreach": False}),
    "sgd_fused": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "foreach": False}),
    "adam_fused": (torch.optim.Adam, {"lr": 1e-2, "fused": True}),
    "adamw_amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True, "foreach": False}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw_foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "foreach": False}),
    "adadelta": (torch.optim.Adadelta, {"foreach": False}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-2, "foreach": False}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2, "foreach": False}),
    "radam": (torch.optim.RAdam, {"lr": 1e-2, "foreach": False}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9, "centered": True, "foreach": False}),
    "rprop": (torch.optim.Rprop, {"foreach": False}),
    "asgd": (torch.optim.ASGD, {"foreach": False}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2, "foreach": False}),
    "muon": (torch.optim.Muon, {"lr": 1e-2}),
}


class OptimizerProbe(ProbeModule):
    """Trains with one optimizer of the table and records its state by parameter name."""

    def __init__(self, name: str) -> None:
        self.optimizer_name = name
        super().__init__()

    def configure_optimizers(self) -> Any:
        kind, options = OPTIMIZERS[self.optimizer_name]
        matrices_only = kind is torch.optim.Muon
        return kind([p for p in self.parameters() if p.ndim == 2 or not matrices_only], **options)

    def on_train_end(self) -> None:
        state = self.trainer.optimizers[0].state
        for name, parameter in self.named_parameters():
            for key, value in sorted(state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    self.record(f"{key} of {name}", value)


for _name in OPTIMIZERS:
    CASES[f"optimizer_{_name}"] = ParityCase(
        name=f"optimizer_{_name}",
        hazard="The user's optimizer steps on host parameters with host state, and both are equal to the plain run's.",
        module=lambda name=_name: OptimizerProbe(name),  # type: ignore[misc]
        options={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        once=True,
    )
