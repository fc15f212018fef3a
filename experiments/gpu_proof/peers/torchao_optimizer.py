"""torchao's ``CPUOffloadOptimizer``: weights stay on the device, gradients and optimizer states go to the host.

Settings: torchao's ``optim`` page recommends ``offload_gradients=True`` without accumulation, and fused AdamW.
"""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import LEARNING_RATE, make_model
from experiments.gpu_proof.peers import Contender, training_step

PACKAGE = "torchao"
DEVICES = ("cuda",)


def prepare(job: Job, device: torch.device) -> Contender:
    """Put the model on the device and its optimizer on the host."""
    from torchao.optim import CPUOffloadOptimizer

    model = make_model(job).to(device)
    options = {"lr": LEARNING_RATE, "fused": True}
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True, **options)
    return Contender(training_step(model, optimizer), "offload_gradients=True")
