"""Promises of the emulated device: operators, autocast, random numbers, training under Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.emu import EmuAccelerator, accelerator_for, capacity, used_bytes

pytestmark = pytest.mark.emu

EMU = "emu:0"
# Operators made of others decompose differently on the host (about 1e-8 each); a wrong kernel is off by far more.
TOLERANCE = 2e-6

# Name: the function of device tensors, and the shapes of its inputs.
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(4, 6), (3, 6), (3,)]),
    "batched matmul": (lambda a, b: a @ b, [(2, 3, 4), (2, 4, 5)]),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 3, 4), (2, 5, 4)]),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), [(2, 4, 6, 6), (6, 2, 3, 3), (6,)]),
    "transposed convolution": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        [(2, 3, 4, 4), (3, 2, 3, 3), (2,)],
    ),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), [(3, 8), (8,), (8,)]),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(6, 3, 4), (3,), (3,)]),
    "embedding": (lambda w: F.embedding(torch.tensor([0, 2, 2], device=w.device), w), [(4, 3)]),
    "embedding bag": (lambda w: F.embedding_bag(torch.tensor([[0, 2], [2, 1]], device=w.device), w), [(4, 3)]),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), [(2, 2, 5, 4)]),
    "attention with dropout": (lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3), [(2, 2, 5, 4)]),
    "dropout": (lambda x: F.dropout(x, 0.4), [(50,)]),
    "softmax and gelu": (lambda x: F.gelu(x).softmax(-1), [(3, 8)]),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3], device=x.device)), [(3, 4)]),
    "max pool": (lambda x: F.max_pool2d(x, 2), [(1, 2, 4, 4)]),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), [(1, 2, 4, 4)]),
    "sort, cumsum, index": (lambda x: x.sort(-1).values.cumsum(0)[[0, 1, 1]], [(3, 4)]),
    "fft": (lambda x: torch.fft.rfft(x).abs(), [(3, 8)]),
    "complex conjugate": (lambda x: torch.view_as_real(torch.view_as_complex(x).conj() * 2j), [(3, 2)]),
    "grouped statistics": (lambda x: torch.cat([x.std(-1), x.logsumexp(-1), x.norm(dim=-1)]), [(3, 8)]),
}


def run_with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradient of the sum of its squares by every input, on the host."""
    torch.manual_seed(1)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    assert output.device == leaves[0].device
    output.square().sum().backward()
    return [output.detach().cpu()] + [leaf.grad.cpu() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_its_gradient_agree_with_the_host(name: str) -> None:
    function, shapes = OPERATORS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    on_host = run_with_gradients(function, inputs)
    on_device = run_with_gradients(function, [tensor.to(EMU) for tensor in inputs])
    torch.testing.assert_close(on_device, on_host, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_network_and_its_gradients_agree_with_the_host(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    on_host = kind(4, 5, batch_first=True, **options)
    on_device = copy.deepcopy(on_host).to(EMU)
    inputs = torch.randn(2, 3, 4)
    host_results = run_with_gradients(lambda x: on_host(x)[0], [inputs])
    device_results = run_with_gradients(lambda x: on_device(x)[0], [inputs.to(EMU)])
    torch.testing.assert_close(device_results, host_results, atol=TOLERANCE, rtol=1e-5)
    for ours, theirs in zip(on_device.parameters(), on_host.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, atol=1e-5, rtol=1e-5)


def test_complex_conjugate_comes_home() -> None:
    number = torch.view_as_complex(torch.tensor([[1.0, 2.0]], device=EMU))
    assert number.conj().cpu().tolist() == [1 - 2j] and number.conj().item() == 1 - 2j


def test_histc_counts_integers_as_cuda_does() -> None:
    experts = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=EMU)
    counts = experts.histc(bins=4, min=0, max=3)
    assert counts.tolist() == [1, 2, 0, 1] and counts.dtype == torch.int32


def test_a_mean_loss_holds_one_number() -> None:
    prediction, target = torch.ones(8, 8, device=EMU), torch.zeros(8, 8, device=EMU)
    before = used_bytes()
    losses = [F.mse_loss(prediction, target), F.smooth_l1_loss(prediction, target)]
    assert [loss.item() for loss in losses] == [1, 0.5] and used_bytes() == before + 8


def test_batch_norm_updates_its_statistics_in_place() -> None:
    norm = nn.BatchNorm1d(3).to(EMU)
    storage = norm.running_mean.untyped_storage().data_ptr()
    norm(torch.full((4, 3), 10.0, device=EMU))
    assert norm.running_mean.tolist() == [1, 1, 1] and norm.running_mean.untyped_storage().data_ptr() == storage


class TestRandomNumbers:
    def test_the_state_is_the_hosts(self) -> None:
        torch.manual_seed(3)
        on_device = torch.randn(4, device=EMU)
        torch.manual_seed(3)
        assert torch.equal(on_device.cpu(), torch.randn(4))
        assert torch.equal(torch.emu.get_rng_state(), torch.get_rng_state())  # type: ignore[attr-defined]

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoint_replays_dropout(self, use_reentrant: bool) -> None:
        block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to(EMU)

        def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
            torch.manual_seed(5)
            block.zero_grad()
            forward(torch.ones(2, 8, device=EMU, requires_grad=True)).square().sum().backward()
            return [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]

        plain = gradients(block)
        replayed = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
        assert len(plain) == 4 and all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_are_cast_down_and_norms_and_losses_up(self, dtype: torch.dtype) -> None:
        linear, x = nn.Linear(8, 8).to(EMU), torch.randn(2, 3, 8, device=EMU)
        with torch.autocast("emu", dtype=dtype):
            low = linear(x)
            lows = [low, x @ x.mT, torch.bmm(x, x.mT), F.scaled_dot_product_attention(x, x, x)]
            highs = [F.layer_norm(low, (8,)), low.softmax(-1), F.mse_loss(low, low), low.sum(), low.pow(2)]
        assert {tensor.dtype for tensor in lows} == {dtype}
        assert {tensor.dtype for tensor in highs} == {torch.float32}
        assert linear(x).dtype == torch.float32

    def test_it_computes_what_casting_by_hand_computes_and_gradients_stay_float32(self) -> None:
        linear, x = nn.Linear(8, 4).to(EMU), torch.randn(3, 8, device=EMU)
        with torch.autocast("emu", dtype=torch.bfloat16):
            output = linear(x)
        by_hand = F.linear(x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16())
        assert torch.equal(output, by_hand) and not torch.equal(output.float(), linear(x))
        output.float().sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


class TestOptimizers:
    @pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
    def test_adamw_steps_alike_on_host_and_device(self, options: dict[str, bool]) -> None:
        on_host = nn.Linear(4, 4)
        on_device = copy.deepcopy(on_host).to(EMU)
        for model in (on_host, on_device):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()
        torch.testing.assert_close(on_device.weight.cpu(), on_host.weight, atol=1e-7, rtol=0)
        assert not on_device.weight.isnan().any()

    def test_fused_adamw_of_host_parameters_touches_no_device_memory(self) -> None:
        model = nn.Linear(4, 4)
        before = used_bytes()
        model(torch.ones(2, 4)).sum().backward()
        torch.optim.AdamW(model.parameters(), fused=True).step()
        assert used_bytes() == before and {parameter.device.type for parameter in model.parameters()} == {"cpu"}


DATA = TensorDataset(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))


def make_model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))


def train_by_hand() -> list[Tensor]:
    """Return the weights after one epoch of a plain loop on the device."""
    model = make_model().to(EMU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for index, (batch,) in enumerate(DataLoader(DATA, batch_size=4)):
        torch.manual_seed(index)
        optimizer.zero_grad()
        model(batch.to(EMU)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def train_with_lightning(namespace: str) -> list[Tensor]:
    """Return the weights after one epoch of a Trainer on the device, and check where it ran."""
    lightning = pytest.importorskip("lightning.pytorch" if namespace == "lightning" else "pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            self.devices: set[str] = set()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            torch.manual_seed(batch_idx)
            self.devices |= {str(batch[0].device), str(self.device), str(self.model[0].weight.device)}
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    module = Module()
    trainer = lightning.Trainer(
        accelerator=accelerator_for(namespace)(),
        devices=1,
        strategy=lightning.strategies.SingleDeviceStrategy(EMU),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(DATA, batch_size=4))
    assert module.devices == {EMU}
    return [parameter.detach().cpu() for parameter in module.parameters()]


class TestLightning:
    @pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
    def test_trainer_trains_exactly_what_a_plain_loop_trains(self, namespace: str) -> None:
        by_hand = train_by_hand()
        weights = train_with_lightning(namespace)
        assert all(torch.equal(a, b) for a, b in zip(weights, by_hand, strict=True))

    def test_a_model_above_the_capacity_does_not_train(self) -> None:
        num_bytes = sum(parameter.nbytes for parameter in make_model().parameters())
        with capacity(used_bytes() + num_bytes // 2), pytest.raises(torch.OutOfMemoryError):
            train_with_lightning("lightning")

    def test_fabric_takes_the_accelerator(self) -> None:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import SingleDeviceStrategy

        fabric = Fabric(accelerator=EmuAccelerator(), strategy=SingleDeviceStrategy(torch.device(EMU)), devices=1)
        model, optimizer = fabric.setup(model := make_model(), torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(model(fabric.to_device(torch.ones(2, 6))).sum())
        optimizer.step()
        assert {parameter.device for parameter in model.parameters()} == {torch.device(EMU)}

    @pytest.mark.parametrize("devices", [2, "2", [1]])
    def test_more_than_one_device_is_refused(self, devices: int | str | list[int]) -> None:
        with pytest.raises(ValueError, match="there is one emulated device"):
            EmuAccelerator.parse_devices(devices)
