"""The network of this experiment, and one process that trains it, with memory to spare or without."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from limits import limit_memory

_PERIOD_S = 5e-3


class Job(NamedTuple):
    """What a process does; its command line as JSON.

    Attributes:
        folder: of the initial weights.
        store: of the weights and optimizer states; None trains without this package.
        limit_bytes: of memory; 0 for none.
        batch: rows.
        with_trainer: by Lightning's Trainer, which lets units be updated in backward; else by a loop in plain PyTorch.
        announces: the plain loop promises to look at no gradient before the step, which lets units be updated too.
        record_step: recorded, see :class:`SuperpipeConfig`.
        trace: file for the recording.
        k: units on the device at once.
        ring: buffers between disk and memory; None leaves it open.
        activations: what becomes of them.
        profile: file for what the run measures of its units.
        watches: its memory is sampled, which takes a tenth of a core.
    """

    folder: str
    store: Any
    limit_bytes: int = 0
    steps: int = 3
    batch: int = 16
    width: int = 512
    blocks: int = 96
    seed: int = 0
    update: str = "auto"
    with_trainer: bool = False
    announces: bool = False
    record_step: int | None = None
    trace: str | None = None
    k: int = 2
    ring: int | None = None
    activations: str = "keep"
    profile: str | None = None
    watches: bool = False


class Watch:
    """Largest resident memory of this process, sampled: its own pages, and with pages of files."""

    def __init__(self) -> None:
        self.peak_own_bytes = self.peak_resident_bytes = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            sizes = {name: int(size.split()[0]) * 1024 for name, size in _status()}
            self.peak_own_bytes = max(self.peak_own_bytes, sizes["RssAnon"])
            self.peak_resident_bytes = max(self.peak_resident_bytes, sizes["VmRSS"])
            time.sleep(_PERIOD_S)


def _status() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith(("Rss", "VmRSS")):
            yield name, value


def network(width: int, blocks: int) -> Any:
    """Blocks of two matrices, 8 * width ** 2 parameters each; each adds to what went in."""
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: Any) -> Any:
            return x + self.down(F.gelu(self.up(x)))

    return nn.Sequential(*(Block() for _ in range(blocks)))


def train(job: Job) -> dict[str, Any]:
    """Train, and return what came of it and what it took."""
    import torch

    from lightning_superpipe import attach, map_safetensors

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = network(job.width, job.blocks)
    weights = map_safetensors(job.folder)
    if job.store is None:
        weights = {name: value.clone() for name, value in weights.items()}
    model.load_state_dict(weights, assign=True)
    del weights
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(job.seed)
    pipe = None
    if job.store is not None:
        options = {"store": job.store, "update": job.update, "record_step": job.record_step}
        options |= {"activations": job.activations} | ({} if job.ring is None else {"disk": {"ring": job.ring}})
        pipe = attach(model, optimizer, device="cpu", k=job.k, **options)
    losses, seconds, forwards, in_backward = [], [], [], [0, 0]
    for number in range(job.steps):
        start = time.perf_counter()
        loss = model(torch.randn(job.batch, job.width, generator=generator)).pow(2).mean()
        forwards.append(time.perf_counter() - start)
        before = traffic(pipe) if number == job.steps - 1 else [0, 0]
        with contextlib.nullcontext() if pipe is None or not job.announces else pipe.updating(optimizer):
            loss.backward()
            if number == job.steps - 1:
                in_backward = [now - then for now, then in zip(traffic(pipe), before, strict=True)]
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {"losses": losses, "step_seconds": seconds, "forward_seconds": forwards}
    found["backward_bytes"] = in_backward  # read and written
    if pipe is not None:
        report = pipe.report()
        found |= {"read_bytes": report.last_step.disk_read_bytes, "written_bytes": report.last_step.disk_written_bytes}
        found |= {"stall_seconds": report.last_step.stall_seconds}
        if job.trace is not None and pipe.recording is not None:
            pipe.recording.save(job.trace)
        if job.profile is not None and (profile := pipe.unit_profile()) is not None:
            profile.save(job.profile)
        found["cpu_seconds"] = _cpu_seconds()  # of all steps
    found["sums"] = [_sum(value) for value in _tensors(model, optimizer)]
    if pipe is not None:
        pipe.close()
    return found


def traffic(pipe: Any) -> list[int]:
    """Bytes read from and written to files so far."""
    total = None if pipe is None else pipe.report().total
    return [0, 0] if total is None else [total.disk_read_bytes, total.disk_written_bytes]


def train_by_trainer(job: Job) -> dict[str, Any]:
    """Train in Lightning's Trainer; return the pace and the bytes of a step."""
    import lightning as L
    import torch

    from lightning_superpipe import SuperpipeStrategy, map_safetensors

    torch.set_num_threads(1)
    with torch.device("meta"):
        net = network(job.width, job.blocks)
    weights = map_safetensors(job.folder)
    net.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    starts: list[float] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net.requires_grad_(True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            starts.append(time.perf_counter())
            return self.net(batch).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    strategy: Any = "auto" if job.store is None else SuperpipeStrategy(k=2, store=job.store, update=job.update)
    batches = list(torch.randn(job.steps, job.batch, job.width))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = L.Trainer(max_epochs=1, accelerator="cpu", strategy=strategy, enable_model_summary=False, **quiet)
    run.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    found: dict[str, Any] = {"step_seconds": [end - start for start, end in pairwise(starts)]}
    if job.store is not None:
        report = strategy.report()
        found |= {"read_bytes": report.last_step.disk_read_bytes, "written_bytes": report.last_step.disk_written_bytes}
    return found


def _cpu_seconds() -> dict[str, float]:
    """Processor time of each thread that is alive, by its name; one that is just starting or ending has none."""
    import psutil

    spent = {each.id: each.user_time + each.system_time for each in psutil.Process().threads()}
    return {each.name: spent[each.native_id] for each in threading.enumerate() if each.native_id in spent}


def _tensors(model: Any, optimizer: Any) -> Iterator[Any]:
    for parameter in model.parameters():
        yield parameter.detach()
        yield from optimizer.state[parameter].values()


def _sum(tensor: Any) -> int:
    """A checksum of a tensor's bytes: equal ones, over all tensors, are taken for equal bits."""
    return zlib.crc32(tensor.reshape(-1).view(dtype=_byte()).numpy())


def _byte() -> Any:
    import torch

    return torch.uint8


def main() -> None:
    """Do the job of the command line."""
    job = Job(**json.loads(sys.argv[1]))
    by = limit_memory(job.limit_bytes) if job.limit_bytes else "none"  # before anything large is imported
    watch = Watch() if job.watches else None
    found = train_by_trainer(job) if job.with_trainer else train(job)
    if watch is not None:
        found |= {"own_bytes": watch.peak_own_bytes, "resident_bytes": watch.peak_resident_bytes}
    print(json.dumps({**found, "limited_by": by}))


if __name__ == "__main__":
    main()
