"""The small module that every probe bends in one place, and the register of all cases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = [
    "CASES",
    "WIDTH",
    "Block",
    "Device",
    "ManualProbe",
    "ParityCase",
    "ParityModule",
    "ProbeModule",
    "SquareWeight",
    "fixed_batches",
    "probe",
]

Device = Literal["cpu", "emu", "cuda"]  # cases name the first two; tests/gpu runs them all on the third
WIDTH = 16
NUM_BLOCKS = 4


class ParityModule(L.LightningModule):
    """Writes down what two runs are compared by: losses, and whatever else a case looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.extra: list[tuple[str, Tensor]] = []

    def record_loss(self, loss: Tensor) -> None:
        """Append a loss, copied to the host."""
        self.losses.append(loss.detach().cpu().clone())

    def record(self, name: str, value: Tensor | float) -> None:
        """Append a named value, copied to the host."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        self.extra.append((name, tensor.detach().cpu().clone()))


class Block(nn.Module):
    """Residual feed-forward block with dropout, (N, width) -> (N, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return x + update


class SquareWeight(nn.Module):
    """Base of the units that use one bare matrix: ``weight``, shape (WIDTH, WIDTH), and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.linear = nn.Linear(WIDTH, WIDTH)


class ProbeModule(ParityModule):
    """Four blocks between two linear layers, trained on four batches; a probe overrides what it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, 2)
        self.build()

    def build(self) -> None:
        """Add or change submodules."""

    def block(self, index: int) -> Block:
        """Return one of the blocks, typed."""
        return cast(Block, self.blocks[index])

    def trunk(self, x: Tensor) -> Tensor:
        """Return the hidden state before the head, (N, WIDTH) -> (N, WIDTH)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.trunk(x)))

    def loss(self, x: Tensor) -> Tensor:
        """Return the scalar to minimise."""
        return cast(Tensor, self(x)).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.record_loss(loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record("validation", self(batch))

    def configure_optimizers(self) -> Any:
        return self.adamw()

    def adamw(self, **options: Any) -> torch.optim.AdamW:
        """Return AdamW over all parameters, the for-loop kernel unless told otherwise: the same on every device."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, **(options or {"foreach": False}))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return fixed_batches(4)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return fixed_batches(2)


class ManualProbe(ProbeModule):
    """Base of the probes that optimise by hand."""

    fused = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def optimizer(self) -> Any:
        """Return the one optimizer, wrapped by Lightning."""
        return self.optimizers()

    def configure_optimizers(self) -> Any:
        return self.adamw(fused=True) if self.fused else self.adamw()


def fixed_batches(num_batches: int) -> DataLoader[Tensor]:
    """Return the same random batches of shape (4, WIDTH) each time."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, WIDTH, generator=generator) for _ in range(num_batches)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


@dataclass(frozen=True, eq=False)  # hashed by identity
class ParityCase:
    """One module and the way it is trained.

    Attributes:
        name: of the test.
        hazard: what could go wrong, one sentence.
        module: builds the module; called after seeding.
        options: Trainer options; a callable value gets the device's name and makes the value anew for each run.
        stages: Trainer methods to call, in order.
        devices: where the case runs.
        gap: why a device is missing.
        inherent: what differs by nature, and only in ``extra``; a test asserts that it still does.
        once: try one window only, where the window is not what is at stake and a run takes long.
    """

    name: str
    hazard: str
    module: Callable[[], ParityModule]
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("fit", "validate")
    devices: tuple[Device, ...] = ("cpu", "emu")
    gap: str = ""
    inherent: str = ""
    once: bool = False

    def __post_init__(self) -> None:
        assert self.hazard, f"{self.name}: say the hazard"
        assert self.gap or len(self.devices) == 2, f"{self.name}: say why a device is missing"


CASES: dict[str, ParityCase] = {}
ModuleT = TypeVar("ModuleT", bound=type[ParityModule])


def probe(
    *,
    devices: tuple[Device, ...] = ("cpu", "emu"),
    gap: str = "",
    inherent: str = "",
    once: bool = False,
    **options: Any,
) -> Callable[[ModuleT], ModuleT]:
    """Register a module class as a case: its docstring is the hazard, ``options`` go to the Trainer.

    >>> @probe(max_epochs=1)
    ... class NothingSpecial(ProbeModule):
    ...     "A hazard."
    >>> CASES.pop("nothing_special").hazard
    'A hazard.'
    """

    def register(module: ModuleT) -> ModuleT:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", module.__name__).lower()
        hazard = " ".join((module.__doc__ or "").split())
        CASES[name] = ParityCase(name, hazard, module, options, devices=devices, gap=gap, inherent=inherent, once=once)
        return module

    return register
