"""DeepSpeed ZeRO-3 with parameters and optimizer on the host, pinned.

Settings: DeepSpeed's ZeRO-Offload tutorial and its configuration page. Weights, gradients and states are kept in
bfloat16 as everybody's here, for which DeepSpeed has options; its default is fp32 master weights, twice the memory.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import LEARNING_RATE, loss_of, make_model
from experiments.gpu_proof.peers import Contender, keep_builds_apart

PACKAGE = "deepspeed"
DEVICES = ("cuda",)
BUILD_SECONDS = 300.0  # its CPU Adam


def configuration(job: Job) -> dict[str, object]:
    """Return what DeepSpeed's JSON file would hold."""
    host = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": job.scale.batch_size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": host,
            "offload_optimizer": host,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    }


def prepare(job: Job, device: torch.device) -> Contender:
    """Hand the model to DeepSpeed."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
    keep_builds_apart()
    import deepspeed

    model = make_model(job)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configuration(job))

    def step(ids: Tensor) -> Tensor:
        loss = loss_of(engine, ids)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Contender(step, "ZeRO-3, one rank, bf16 master weights and states")
