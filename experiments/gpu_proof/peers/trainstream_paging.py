"""TrainStream with all blocks paged to the host.

Settings: its README. ``offload="auto"`` and ``param_offload="auto"`` would keep everything on a large card, so both are
on; moments in bfloat16 as everybody's here; activations are recomputed, not paged, as for everybody.
"""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import LEARNING_RATE, make_model
from experiments.gpu_proof.peers import Contender, training_step

PACKAGE = "trainstream"
DEVICES = ("cuda",)
BUILD_SECONDS = 120.0


def prepare(job: Job, device: torch.device) -> Contender:
    """Wrap a model that stays on the host. The first import on a machine compiles its extension."""
    import trainstream

    model = make_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = trainstream.wrap(
        model,
        optimizer,
        device=device,
        offload=True,
        param_offload=True,
        activation_offload=False,
        moment_dtype="bfloat16",
        quantize="none",
    )
    return Contender(training_step(model, optimizer), "all blocks paged, bf16 moments")
