"""diffusers' group offloading, which works on any module: block by block, the next on a stream of its own. Inference.

Settings: diffusers' page on memory: ``block_level`` with one block a group, ``use_stream`` and ``record_stream`` where
there are streams.
"""

from __future__ import annotations

import torch

from experiments.gpu_proof.job import CannotRun, Job
from experiments.gpu_proof.network import make_model
from experiments.gpu_proof.peers import Contender, inference_step

PACKAGE = "diffusers"
DEVICES = ("cuda", "cpu")


def prepare(job: Job, device: torch.device) -> Contender:
    """Hook the decoder's blocks; the head stays on the device."""
    from diffusers.hooks import apply_group_offloading

    if job.task != "infer":
        raise CannotRun("group offloading is made for inference")
    model, streams = make_model(job), device.type == "cuda"
    apply_group_offloading(
        model.model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
        record_stream=streams,
    )
    model.lm_head.to(device)
    return Contender(inference_step(model), "one block a group" + (", on a stream" if streams else ""))
