"""FSDP2 on one rank with ``CPUOffloadPolicy``: shards (here: everything) rest in pinned host memory.

Settings: torch's ``fully_shard`` page: each block, then the root; pinned memory; the next block is gathered meanwhile
(implicit prefetching), the update runs on the host.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from experiments.gpu_proof.job import Job
from experiments.gpu_proof.network import make_model, make_optimizer
from experiments.gpu_proof.peers import Contender, training_step

PACKAGE = None
DEVICES = ("cuda", "cpu")


def prepare(job: Job, device: torch.device) -> Contender:
    """Shard a model that stays on the host over one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    model = make_model(job)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    model.model.rotary_emb.to(device)  # buffers are the user's to move

    def finish() -> dict[str, object]:
        dist.destroy_process_group()
        return {}

    return Contender(training_step(model, make_optimizer(model.parameters())), "one rank", finish)
