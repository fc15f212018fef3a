"""Accelerate's ``cpu_offload``: each module's weights come for its forward and go. Inference only."""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import CannotRun, Job
from experiments.gpu_proof.network import make_model
from experiments.gpu_proof.peers import Contender, inference_step

PACKAGE = "accelerate"
DEVICES = ("cuda", "cpu")


def prepare(job: Job, device: torch.device) -> Contender:
    """Hook a model that stays on the host."""
    from accelerate import cpu_offload

    if job.task != "infer":
        raise CannotRun("its hooks replace parameters, so that an optimizer holds dead ones: inference only")
    model = cpu_offload(make_model(job), execution_device=device)
    return Contender(inference_step(model))
