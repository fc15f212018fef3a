"""This package: ``k`` units on the device, moved ``k_prime`` at a time."""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import make_model, make_optimizer
from experiments.gpu_proof.peers import Contender, inference_step, training_step
from lightning_superpipe import attach

PACKAGE = None
DEVICES = ("cuda", "emu", "cpu")


def prepare(job: Job, device: torch.device) -> Contender:
    """Stream the model; it stays on the host."""
    model = make_model(job)
    k = "auto" if job.k is None else job.k
    if job.task == "infer":
        pipe = attach(model, device=device, k=k, k_prime=job.k_prime)
        step = inference_step(model)
    else:
        optimizer = make_optimizer(model.parameters())
        pipe = attach(model, optimizer, device=device, k=k, k_prime=job.k_prime)
        step = training_step(model, optimizer)
    window = pipe.report()

    def finish() -> dict[str, object]:
        metrics = pipe.report().as_metrics(prefix="")
        pipe.close()
        return {"superpipe": metrics}

    return Contender(step, f"k={window.k}, k'={window.k_prime} of {window.num_units} units", finish)
