from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from threading import Thread

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_superpipe.observe import LiveBytes


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(16), nn.Linear(16, 4))


def train_step(model: nn.Module) -> tuple[Tensor, ...]:
    """Return loss, gradients and the state of the random generator after one step."""
    torch.manual_seed(1)
    loss = model(torch.randn(32, 8)).square().mean()
    loss.backward()
    return loss.detach(), *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()


def test_bytes_follow_storages_from_creation_to_death() -> None:
    with LiveBytes("cpu") as live:
        one = torch.zeros(100)
        assert live.current_bytes == 400
        two = one + 1
        assert live.current_bytes == 800
        del one
        assert live.current_bytes == 400
        two = two.double()
        assert (live.current_bytes, live.peak_bytes) == (800, 1200)
    del two
    assert (live.current_bytes, live.peak_bytes) == (0, 1200)


def test_views_and_operations_in_place_add_nothing() -> None:
    with LiveBytes("cpu") as live:
        base = torch.zeros(10, 10)
        views = [base.t(), base[3], base.view(-1), base.detach(), base.untyped_storage()]
        base.add_(1).mul_(2)
        torch.add(base, 1, out=base)
        assert (live.current_bytes, live.peak_bytes) == (400, 400)
        del base
        assert live.current_bytes == 400  # the views still hold it
        views.clear()
        assert live.current_bytes == 0


def test_storages_from_before_do_not_count_however_they_are_used() -> None:
    weight = torch.ones(50)
    with LiveBytes("cpu") as live:
        held = [weight.view(5, 10), weight.t(), weight.add_(1), torch.empty(0).set_(weight.untyped_storage())]
        assert live.current_bytes == 0
        held.append(weight * 2)
        assert live.current_bytes == 200


@pytest.mark.parametrize("make", [lambda: torch.tensor([1.0] * 25), lambda: torch.zeros(1).new_tensor([1.0] * 25)])
def test_tensors_made_from_python_numbers_count(make: Callable[[], Tensor]) -> None:
    with LiveBytes("cpu") as live:
        tensor = make()
        assert live.current_bytes == tensor.nbytes == 100


def test_a_storage_that_grows_counts_with_its_new_size() -> None:
    with LiveBytes("cpu") as live:
        tensor = torch.zeros(10)
        tensor.resize_(100)
        assert live.current_bytes == 400
        del tensor
        assert live.current_bytes == 0


def test_other_devices_do_not_count() -> None:
    with LiveBytes("meta") as live:
        host, meta = torch.zeros(10), torch.zeros(10, device="meta")
        assert live.current_bytes == meta.untyped_storage().nbytes() == 40
        del host, meta


def test_what_autograd_saves_counts_until_backward_frees_it() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes("cpu") as live:
        loss = (weight * 2).exp().sum()  # exp saves its result, 400 bytes; the product dies; the loss is 4
        assert live.current_bytes == 404
        torch.autograd.backward(loss)
        assert live.current_bytes == 404  # the gradient came, the saved result went
        del loss
        assert live.current_bytes == 400
    weight.grad = None
    assert live.current_bytes == 0


def test_recent_peak_starts_anew_at_what_is_alive() -> None:
    with LiveBytes("cpu") as live:
        kept = torch.zeros(10)
        torch.zeros(100)
        assert live.take_recent_peak() == 440
        assert live.take_recent_peak() == 40
        torch.zeros(50)
        assert live.take_recent_peak() == 240
        assert live.peak_bytes == 440
        del kept
    assert live.take_recent_peak() == 40
    assert live.take_recent_peak() == 0


@pytest.mark.parametrize("excluded", [True, False])
def test_memory_at_an_excluded_address_does_not_count(excluded: bool) -> None:
    slot = numpy.zeros(16, dtype=numpy.float32)
    with LiveBytes("cpu", exclude=[slot.ctypes.data] if excluded else []) as live:
        over_slot, view = torch.from_numpy(slot), torch.from_numpy(slot)[2:]
        assert live.current_bytes == (0 if excluded else 2 * 64)  # to torch these are two storages
        del over_slot, view
        assert live.current_bytes == 0


def test_a_tensor_accounted_for_elsewhere_is_left_out_for_good() -> None:
    with LiveBytes("cpu") as live:
        anchor, other = torch.zeros(10), torch.zeros(5)
        live.leave_out(anchor)
        assert live.current_bytes == 20
        view = anchor.view(2, 5).add_(1)
        assert live.current_bytes == 20
        del anchor, view, other
        assert live.current_bytes == 0


def test_reused_addresses_do_not_confuse_the_count() -> None:
    with LiveBytes("cpu") as live:
        for size in range(1, 500):
            tensor = torch.zeros(size % 7 + 1)
            assert live.current_bytes == tensor.nbytes
            del tensor
    assert live.current_bytes == 0


def test_tensors_released_by_other_threads_meanwhile_are_subtracted() -> None:
    with LiveBytes("cpu") as live:
        batches = [[torch.zeros(10) for _ in range(300)] for _ in range(4)]
        threads = [Thread(target=batch.clear) for batch in batches]
        for thread in threads:
            thread.start()
        kept = [torch.zeros(1) for _ in range(300)]
        for thread in threads:
            thread.join()
        assert live.current_bytes == 4 * 300
        del batches, kept
    assert live.current_bytes == 0


def test_an_exception_ends_the_mode() -> None:
    live = LiveBytes("cpu")
    with pytest.raises(ValueError, match="in forward"), live:
        inside = torch.zeros(10)
        raise ValueError("in forward")
    after = torch.zeros(10)
    assert live.current_bytes == 40
    del inside, after
    assert live.current_bytes == 0


def test_nothing_is_kept_alive() -> None:
    model, live = small_model(), LiveBytes("cpu")
    with live:
        output = model(torch.randn(2, 8))
    watched = [weakref.ref(output), weakref.ref(live), weakref.ref(model)]
    del live
    gc.collect()
    assert watched[1]() is None  # tensors that it counted live on without it
    del output, model
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]


def test_no_number_changes() -> None:
    plain = train_step(small_model())
    with LiveBytes("cpu") as live:
        counted = train_step(small_model())
    assert live.peak_bytes > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


def test_compiled_code_stays_compiled() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        def run(*args: Tensor) -> object:
            calls.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(lambda x: F.gelu(x) * 2, backend=backend)
    x = torch.randn(16)
    plain = compiled(x)
    with LiveBytes("cpu") as live:
        counted = compiled(x)
    assert (len(calls), live.current_bytes) == (2, 64)
    assert torch.equal(plain, counted)


@pytest.mark.emu
def test_count_equals_the_allocator_of_a_second_device_through_backward() -> None:
    from tests import emu

    device = emu.load()
    model = small_model().to(device)
    x = torch.randn(32, 8).to(device)
    gc.collect()
    before = emu.used_bytes()
    emu.reset_peak()
    with LiveBytes("emu") as live:
        loss = model(x).square().mean()
        assert live.current_bytes == emu.used_bytes() - before > 0
        loss.backward()  # on autograd's own thread
        assert live.current_bytes == emu.used_bytes() - before > 0
        assert live.peak_bytes == emu.peak_bytes() - before


@pytest.mark.gpu
def test_count_equals_the_allocator_of_a_gpu_through_backward() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.1)) for _ in range(4))).cuda()
    x = torch.randn(64, 256, device="cuda")
    model(x).mean().backward()  # the workspaces of kernels come now
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    with LiveBytes("cuda") as live:
        model(x).square().mean().backward()
    held = torch.cuda.memory_allocated() - before
    assert live.current_bytes <= held <= live.current_bytes + 512 * 16  # blocks of the allocator are rounded up


def test_what_is_set_apart_counts_in_all_but_not_in_the_rest() -> None:
    with LiveBytes("cpu") as live:
        gradient, other = torch.zeros(64) + 1, torch.zeros(16) + 1
        assert live.take_recent_rest()[1] == 320
        live.set_apart(gradient)  # nothing has run since: the rest begins without it
        live.set_apart(gradient)
        assert (live.current_bytes, live.take_recent_rest()) == (320, (64, 64))
        more = other + 1
        del gradient
        assert (live.current_bytes, live.take_recent_rest()) == (128, (128, 128))
        del more
    assert live.take_recent_rest() == (128, 64)
