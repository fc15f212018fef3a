"""``attach``: what a loop in plain PyTorch may do with a streamed model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superpipe import Adversary, Pipe, attach
from lightning_superpipe.errors import BudgetError, ConfigError, SuperpipeWarning
from tests.frontends.story import VOCABULARY, Story, make_model

pytestmark = pytest.mark.filterwarnings("ignore::lightning_superpipe.errors.SuperpipeWarning")
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
WIDTH = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Tanh()) for _ in range(5)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, device: str = "cpu", num_steps: int = 3) -> list[Tensor]:
    """Return the losses and the weights."""
    torch.manual_seed(1)
    losses = []
    for _ in range(num_steps):
        loss = model(torch.randn(4, WIDTH).to(device)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return losses + [weight.detach().cpu().clone() for weight in model.state_dict().values()]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.emu
@pytest.mark.parametrize("is_on_device", [False, True], ids=["from the host", "from the device"])
def test_loop_on_a_separate_device_is_exact(emu: torch.device, is_on_device: bool) -> None:
    """Also where the model and the optimizer's states have been on the device before."""
    reference = network().to(emu)
    optimizer = adam(reference)
    expected = [train(reference, optimizer, str(emu)) for _ in range(2)][-1]
    model = network().to(emu) if is_on_device else network()
    optimizer = adam(model)
    if is_on_device:
        train(model, optimizer, str(emu))
    with attach(model, optimizer, k=2, device=emu, adversary=Adversary()) as pipe:
        if not is_on_device:
            train(model, optimizer, str(pipe.device))
        assert are_equal(train(model, optimizer, str(pipe.device)), expected)
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_closing_gives_the_model_back(tmp_path: Any) -> None:
    model = network()
    kinds, parameters = [type(each) for each in model.modules()], list(model.parameters())
    optimizer = adam(model)
    with attach(model, optimizer, k=1, device="cpu") as pipe:
        train(model, optimizer)
        assert [type(each) for each in model.modules()] != kinds
    assert [type(each) for each in model.modules()] == kinds
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert pipe.report().num_steps == 3
    assert pipe.report().last_step.num_loads == 2 * 5 - 1
    pipe.close()


def test_loop_goes_on_after_closing_and_attaching_again() -> None:
    reference = network()
    optimizer = adam(reference)
    expected = [train(reference, optimizer) for _ in range(3)][-1]
    model = network()
    optimizer = adam(model)
    for k in (1, 3):
        with attach(model, optimizer, k=k, device="cpu"):
            train(model, optimizer)
    assert are_equal(train(model, optimizer), expected)


def test_copy_of_a_streamed_model_is_an_ordinary_one() -> None:
    model = network()
    with attach(model, k=1, device="cpu") as pipe:
        copied = copy.deepcopy(model)
        num_steps = pipe.report().num_steps
        copied(torch.ones(1, WIDTH)).sum().backward()
        assert pipe.report().num_steps == num_steps
    assert type(copied) is nn.Sequential


def test_error_in_the_loop_leaves_an_ordinary_model() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="shapes"), attach(model, k=1, device="cpu"):
        model(torch.ones(1, WIDTH + 1))
    assert type(model) is nn.Sequential
    assert model(torch.ones(1, WIDTH)).shape == (1, WIDTH)


def test_two_models_train_in_one_loop() -> None:
    def losses(*, streamed: bool) -> list[Tensor]:
        one, other = network(), network()
        optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
        pipes = [attach(each, optimizer, k=2, device="cpu") for each in (one, other)] if streamed else []
        torch.manual_seed(1)
        found = []
        for _ in range(3):
            loss = other(one(torch.randn(4, WIDTH))).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        for pipe in pipes:
            pipe.close()
        return found

    assert are_equal(losses(streamed=True), losses(streamed=False))


# -- generation


@pytest.fixture
def writer() -> Any:
    model = make_model(Story())
    model.eval()
    return model


@pytest.fixture
def pipe(writer: Any) -> Iterator[Pipe]:
    with attach(make_model(Story()).eval(), k=2, device="cpu", adversary=Adversary()) as pipe:
        yield pipe


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampled", "beams", "without cache"],
)
def test_generation_writes_the_same_tokens(writer: Any, pipe: Pipe, how: dict[str, Any]) -> None:
    def write(model: Any) -> Tensor:
        torch.manual_seed(3)
        tokens: Tensor = model.generate(PROMPT, max_new_tokens=8, pad_token_id=0, **how)
        return tokens

    assert torch.equal(write(pipe.model), write(writer))


def test_generation_is_planned_as_one_step(pipe: Pipe) -> None:
    """From the second time on; forward only, the window keeps k - 2 units and every pass loads the others."""
    model: Any = pipe.model
    for _ in range(2):
        before = pipe.report().total
        model.generate(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)
        traffic = pipe.report().total - before
    assert traffic.num_plan_misses == 0
    assert traffic.num_loads == 6 * pipe.report().num_units


def test_assistant_needs_fewer_passes_and_writes_the_same_tokens(writer: Any) -> None:
    def loads(assistant: Any) -> tuple[int, list[int]]:
        with attach(make_model(Story()).eval(), k=2, device="cpu") as pipe:
            model: Any = pipe.model
            own = {} if assistant is None else {"assistant_model": assistant}
            tokens = model.generate(PROMPT[:1], max_new_tokens=10, do_sample=False, pad_token_id=0, **own)
            return pipe.report().num_loads, tokens[0].tolist()

    alone, tokens = loads(None)
    helped, same_tokens = loads(copy.deepcopy(writer))
    assert same_tokens == tokens
    assert helped <= alone / 2, "an assistant that always agrees gives several tokens a pass"
    assert max(tokens) < VOCABULARY


# -- refused


def test_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'k_prime'"):
        attach(network(), kprime=2)


def test_budget_too_small_is_refused_and_leaves_the_model_alone() -> None:
    model = network()
    with pytest.raises(BudgetError, match="device_memory allows"):
        attach(model, k=2, device="cpu", device_memory=100)
    assert type(model) is nn.Sequential


def test_emulation_is_said() -> None:
    with pytest.warns(SuperpipeWarning, match="emulated"):
        attach(network(), k=1, device="cpu").close()


# -- a model that only computes


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(12)))


@pytest.mark.parametrize(("num_units_that_fit", "stays"), [(8, False), (20, True)])
def test_a_model_without_an_optimizer_is_planned_for_its_passes(num_units_that_fit: int, stays: bool) -> None:
    """Also where training begins after all: with the window that was safe for it, and planned anew."""
    model, reference = wide(), wide()
    x = torch.randn(4, 64)
    allowed = num_units_that_fit * 64 * 65 * 4
    with attach(model, device="cpu", device_memory=allowed, adversary=Adversary(max_delay_ms=0.2)) as pipe:
        with torch.no_grad():
            for _ in range(8):
                assert torch.equal(model(x), reference(x))
        report = pipe.report()
        assert "predicted:" in report.plan
        assert ("everything fits" in report.plan) is stays
        assert report.k + report.num_resident <= min(12, num_units_that_fit)
        assert (report.k + report.num_resident == 12) is stays
        for _ in range(8):
            losses = [each(x).pow(2).mean() for each in (model, reference)]
            for loss in losses:
                loss.backward()
            assert torch.equal(*losses)
            with torch.no_grad():
                for own, other in zip(model.parameters(), reference.parameters(), strict=True):
                    assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)
                    own -= 0.1 * own.grad
                    other -= 0.1 * other.grad
                    own.grad = other.grad = None
        assert pipe.report().plan != report.plan
        assert pipe.report().peak_device_bytes <= allowed


@pytest.mark.filterwarnings("ignore")
def test_generation_is_planned_for() -> None:
    model, reference = make_model(Story()).eval(), make_model(Story()).eval()
    with attach(model, device="cpu", device_memory="64MiB") as pipe:
        for _ in range(7):
            found, expected = (
                each.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (model, reference)
            )
            assert torch.equal(found, expected)
        profile = pipe.unit_profile()
        assert profile is not None and not profile.workload.trains and profile.num_passes == 4
        assert "everything fits" in pipe.report().plan
