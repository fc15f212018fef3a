"""The ordinary run: everything on the device. With ``checkpointing`` the usual first remedy against its size."""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import make_model, make_optimizer
from experiments.gpu_proof.peers import Contender, inference_step, training_step

PACKAGE = None
DEVICES = ("cuda", "emu", "cpu")


def prepare(job: Job, device: torch.device) -> Contender:
    """Put the model on the device."""
    model = make_model(job).to(device)
    if job.task == "infer":
        return Contender(inference_step(model))
    return Contender(training_step(model, make_optimizer(model.parameters())))
