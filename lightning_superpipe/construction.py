"""Makes the tuner of a run, with what measures for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch.optim import Optimizer

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.meter import Meter
from lightning_superpipe.planning.budget import KeptBytes, MemoryNeed
from lightning_superpipe.planning.workload import Setting, Workload
from lightning_superpipe.profiling import Profiler
from lightning_superpipe.tuning import Tuner

__all__ = ["make_tuner"]


def make_tuner(
    engine: Engine,
    meter: Meter,
    config: SuperpipeConfig,
    start: Setting,
    *,
    trains: bool,
    need: MemoryNeed,
    limit: int | None,
    optimizers: Callable[[], Sequence[Optimizer]],
    kept_bytes: Callable[[], KeptBytes],
    with_store: Callable[[Workload], Workload],
    host_limit: Callable[[], int],
    machine: Callable[[], MachineProfile | None],
    tell: Callable[[str], None],
) -> Tuner:
    """Return the tuner of a run, with what measures for it; the arguments are theirs."""
    profiler = Profiler(
        engine,
        meter,
        trains=trains,
        optimizers=optimizers,
        kept_bytes=kept_bytes,
        with_store=with_store,
        pinned=config.pin_memory is not False,
    )
    return Tuner(
        engine,
        profiler,
        config,
        replace(start, activations=engine.activations.policies()),
        trains=trains,
        need=need,
        limit=limit,
        host_limit=host_limit,
        machine=machine,
        emulated=not is_separate(engine.device),
        tell=tell,
    )
