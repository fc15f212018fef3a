"""Random small modules, windows, timings and loops: always what the plain loop leaves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_superpipe.config import Adversary, Disk, SuperpipeConfig
from lightning_superpipe.session import Session
from tests.disk.loops import EVERYTHING
from tests.engine.tiny import CPU, WIDTH, Block, Result, batches, is_equal

# -- modules


class Gated(nn.Module):
    """A product of two projections, with a bare parameter and a buffer that counts."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.count = nn.Buffer(torch.zeros(()))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y = self.gate(x).sigmoid() * self.value(x) * self.scale
        return x + F.dropout(y, self.dropout, self.training)


class Recurrent(nn.Module):
    """A recurrent layer over the rows."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.rnn(x[:, None])[0])[:, 0]


class Pair(nn.Module):
    """Two blocks in one."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block(dropout=dropout), Block(dropout=dropout)])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner[1](self.inner[0](x)))


KINDS = {"block": lambda dropout: Block(dropout=dropout), "gated": Gated, "recurrent": Recurrent, "pair": Pair}


class Op(NamedTuple):
    """One thing that forward does; what the numbers mean depends on it, modulo how many there are."""

    name: str
    which: int


class Recipe(NamedTuple):
    """A module, as data: equal recipes make equal modules."""

    stages: tuple[tuple[str, int], ...]
    """Kind and number of the blocks of each stage."""
    ops: tuple[Op, ...]
    tied: tuple[tuple[int, int], ...]
    frozen: tuple[int, ...]
    dropout: float


class Program(nn.Module):
    """Does what its recipe says, on x of shape (4, WIDTH)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.stages = nn.ModuleList(
            nn.ModuleList(KINDS[kind](recipe.dropout) for _ in range(count)) for kind, count in recipe.stages
        )
        self.ops = recipe.ops
        blocks = self.blocks()
        for left, right in recipe.tied:
            _tie(blocks[left % len(blocks)], blocks[right % len(blocks)])
        for which in recipe.frozen:
            parameters = list(self.parameters())
            parameters[which % len(parameters)].requires_grad_(False)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in cast(Sequence[nn.Module], stage)]

    def forward(self, x: Tensor) -> Tensor:
        blocks, kept = self.blocks(), [x]
        x = self.embed(x)
        for name, which in self.ops:
            block = blocks[which % len(blocks)]
            if name == "call":
                x = block(x)
            elif name == "twice":
                x = block(block(x)).tanh()
            elif name == "checkpoint":
                x = checkpoint(block, x, use_reentrant=False)
            elif name == "keep":
                kept.append(x)
            elif name == "skip":
                x = x + kept[which % len(kept)]
            elif name == "detour":
                with torch.no_grad():
                    x = x + block(x)
            elif name == "branch":
                x = blocks[(which + int(x.sum().item() > 0)) % len(blocks)](x)
            elif name == "read":
                x = x * next(block.parameters()).mean().tanh()
        return x.tanh()


def _tie(left: nn.Module, right: nn.Module) -> None:
    """Let two blocks of one kind share a matrix."""
    for name, parameter in left.named_parameters():
        if parameter.dim() == 2 and left is not right and type(left) is type(right):
            owner, _, leaf = name.rpartition(".")
            setattr(right.get_submodule(owner), leaf, parameter)
            return


# -- strategies

NAMES = ["call", "call", "call", "twice", "checkpoint", "keep", "skip", "detour", "branch", "read"]
numbers = st.integers(0, 9)
recipes = st.builds(
    Recipe,
    stages=st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(2, 3)), min_size=1, max_size=3).map(tuple),
    ops=st.lists(st.builds(Op, st.sampled_from(NAMES), numbers), min_size=1, max_size=10).map(tuple),
    tied=st.lists(st.tuples(numbers, numbers), max_size=2).map(tuple),
    frozen=st.lists(st.integers(0, 40), max_size=4).map(tuple),
    dropout=st.sampled_from([0.0, 0.2]),
)


class Loop(NamedTuple):
    """How the module is trained."""

    fused: bool
    num_accumulated: int
    clips: bool
    is_undisturbed: bool
    evaluates: bool
    announces: bool = False
    """Where nothing clips: nobody looks at gradients before the step."""


loops = st.builds(Loop, st.booleans(), st.integers(1, 2), *[st.booleans()] * 4)


class Window(NamedTuple):
    """How it is streamed."""

    k: int
    k_prime: int
    seed: int
    is_late: bool
    update: str = "auto"
    ring: int = 2

    def config(self, store: Any) -> SuperpipeConfig:
        adversary = Adversary(max_delay_ms=0.2 if self.is_late else 0.0, seed=self.seed)
        return SuperpipeConfig(
            k=self.k,
            k_prime=self.k_prime,
            update=self.update,
            store=store,
            activations="offload" if store is EVERYTHING else "auto",
            disk=Disk(ring=self.ring),
            adversary=adversary,
        )


windows = st.builds(
    lambda k, k_prime, *others: Window(k, min(k, k_prime), *others),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(["auto", "auto", "at_once"]),
    st.integers(2, 5),
)
stores = st.sampled_from(["disk", {"states": "disk"}, EVERYTHING])


def run(module: nn.Module, loop: Loop, device: torch.device, session: Session | None = None) -> Result:
    """Train for seven batches: streamed in a session, else on the device as it is."""
    if session is None:
        module.to(device)

    def step(mode: str) -> Any:
        if session is None:
            return torch.enable_grad()
        return session.step(mode, is_undisturbed=loop.is_undisturbed)

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"fused": True} if loop.fused else {"foreach": False}
    optimizer = torch.optim.AdamW(trained or [nn.Parameter(torch.zeros(1))], lr=1e-2, **options)
    if session is not None:
        session.attend([optimizer])
    torch.manual_seed(1)
    losses = []
    for index, x in enumerate(batch.to(device) for batch in [*batches(4), *batches(3)]):
        is_last = (index + 1) % loop.num_accumulated == 0
        may_announce = session is not None and loop.announces and is_last and not loop.clips
        with session.updating_in_backward(optimizer, lends=False) if may_announce else contextlib.nullcontext():
            with step("train"):
                loss = module(x).pow(2).mean()
            losses.append(loss.item())
            if loss.requires_grad:
                loss.backward()
            if is_last:
                if loop.clips:
                    nn.utils.clip_grad_norm_(trained, 0.01, foreach=False)
                optimizer.step()
                optimizer.zero_grad()
        if loop.evaluates:
            module.eval()
            with step("validate"), torch.no_grad():
                losses.append(module(x).sum().item())
            module.train()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return Result(losses, [each.detach().cpu().clone() for each in (*module.state_dict().values(), *states)])


def check(recipe: Recipe, window: Window, loop: Loop, device: torch.device, store: Any = "host") -> None:
    """Compare the streamed run with the ordinary one."""
    expected = run(Program(recipe), loop, device)
    module = Program(recipe)
    classes = [type(each) for each in module.modules()]
    session = Session(module, window.config(store), device, trains=True, owns_root=True)
    try:
        result = run(module, loop, device, session)
        clone = copy.deepcopy(module)
    finally:
        session.close()
    assert is_equal(result, expected)
    assert [type(each) for each in module.modules()] == [type(each) for each in clone.modules()] == classes
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=30)
@given(recipe=recipes, window=windows, loop=loops)
def test_random_module_trains_as_in_the_plain_loop(recipe: Recipe, window: Window, loop: Loop) -> None:
    check(recipe, window, loop, CPU)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes, window=windows, loop=loops)
def test_random_module_trains_as_on_its_device(emu: torch.device, recipe: Recipe, window: Window, loop: Loop) -> None:
    check(recipe, window, loop, emu)


# A parameter that is read outside its unit leaves it; what is left of this one is mostly frozen.
_LEAVES = Recipe(
    stages=(("recurrent", 3),),
    ops=(Op("call", 0), Op("call", 0), Op("call", 0), Op("call", 2), Op("read", 8)),
    tied=(),
    frozen=(0, 11),
    dropout=0.0,
)
# A block that is called later gets its states later.
_BRANCHES = Recipe(stages=(("block", 2),), ops=(Op("branch", 0),), tied=(), frozen=(), dropout=0.0)
_AT_ONCE = Window(1, 1, 0, is_late=False, update="at_once", ring=4)
_PLAIN = Loop(fused=False, num_accumulated=1, clips=False, is_undisturbed=False, evaluates=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("everything_travels")
@settings(max_examples=30)
@given(recipe=recipes, window=windows, loop=loops, store=stores)
@example(recipe=_LEAVES, window=_AT_ONCE, loop=_PLAIN, store={"states": "disk"})
@example(recipe=_BRANCHES, window=_AT_ONCE, loop=_PLAIN, store="disk")
def test_random_module_trains_the_same_from_files(recipe: Recipe, window: Window, loop: Loop, store: Any) -> None:
    check(recipe, window, loop, CPU, store)
