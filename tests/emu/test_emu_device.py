"""Promises of the emulated device: memory, devices, identity, threads, streams."""

from __future__ import annotations

import copy
import ctypes
import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.emu import EmuUnavailable, capacity, peak_bytes, pinned_bytes, reset_peak, set_capacity, used_bytes
from tests.emu import device as loader
from tests.processes import run_code

pytestmark = pytest.mark.emu

EMU = "emu:0"  # torch.device(EMU) needs the device loaded; the word does not


class TestMemory:
    def test_a_device_tensor_has_memory_of_its_own(self) -> None:
        host = torch.zeros(4)
        on_device = host.to(EMU)
        host.fill_(1)
        assert on_device.cpu().tolist() == [0, 0, 0, 0]
        assert on_device.untyped_storage().device == torch.device(EMU)
        assert on_device.untyped_storage().data_ptr() != host.untyped_storage().data_ptr()

    def test_used_bytes_counts_every_byte_of_storage_once(self) -> None:
        before = used_bytes()
        seven = torch.empty(7, dtype=torch.uint8, device=EMU)
        assert used_bytes() == before + 7
        thirty = torch.ones(3, 5, dtype=torch.bfloat16).to(EMU)
        assert used_bytes() == before + 7 + 30
        views = [thirty[1:], thirty.t(), thirty.detach(), thirty.view(-1), seven.expand(9, 7)]
        assert used_bytes() == before + 7 + 30
        del seven, thirty, views
        assert used_bytes() == before

    def test_the_result_of_an_operator_is_counted_and_freed(self) -> None:
        ones = torch.ones(8, 8, device=EMU)
        before = used_bytes()
        product = ones @ ones
        assert used_bytes() == before + product.nbytes
        del product
        assert used_bytes() == before

    def test_peak_bytes_is_the_most_in_use_since_the_reset(self) -> None:
        before = used_bytes()
        reset_peak()
        first = torch.empty(100, dtype=torch.uint8, device=EMU)
        del first
        second = torch.empty(60, dtype=torch.uint8, device=EMU)
        assert peak_bytes() == before + 100
        reset_peak()
        assert peak_bytes() == before + second.nbytes

    def test_torch_accelerator_reports_the_same_counters(self) -> None:
        held = torch.empty(100, dtype=torch.uint8, device=EMU)
        assert torch.accelerator.current_accelerator() == torch.device("emu")
        assert torch.accelerator.memory_allocated() == used_bytes() >= held.nbytes
        assert torch.accelerator.max_memory_allocated() == peak_bytes()
        with capacity(used_bytes() + 50):
            assert torch.accelerator.get_memory_info() == (50, used_bytes() + 50)

    def test_the_capacity_is_exact_and_what_does_not_fit_raises_out_of_memory(self) -> None:
        with capacity(used_bytes() + 64):
            with pytest.raises(torch.OutOfMemoryError, match="emu: out of memory"):
                torch.empty(65, dtype=torch.uint8, device=EMU)
            fits = torch.empty(64, dtype=torch.uint8, device=EMU)
            del fits
            assert torch.empty(64, dtype=torch.uint8, device=EMU).numel() == 64
        assert torch.empty(65, dtype=torch.uint8, device=EMU).numel() == 65

    def test_a_failed_allocation_is_not_counted(self) -> None:
        before = used_bytes()
        with capacity(before + 4), pytest.raises(torch.OutOfMemoryError):
            torch.ones(2).to(EMU)
        assert used_bytes() == before

    def test_a_negative_capacity_is_refused(self) -> None:
        with pytest.raises(ValueError, match="got a capacity of -1 bytes"):
            set_capacity(-1)

    def test_storage_resized_to_nothing_gives_its_bytes_back(self) -> None:
        tensor = torch.ones(16, device=EMU)
        before = used_bytes()
        tensor.untyped_storage().resize_(0)
        assert used_bytes() == before - 64
        tensor.untyped_storage().resize_(64)
        assert used_bytes() == before

    def test_memory_pinned_for_the_device_is_known_as_pinned(self) -> None:
        before = pinned_bytes()
        pinned = torch.empty(10, pin_memory=True)
        assert pinned.is_pinned() and pinned[3:].is_pinned() and torch.ones(2).pin_memory().is_pinned()
        assert not torch.empty(10).is_pinned()
        assert pinned_bytes() == before + 40
        del pinned
        assert pinned_bytes() == before


class TestPoison:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_new_memory_is_nan(self, dtype: torch.dtype) -> None:
        assert torch.empty(33, dtype=dtype, device=EMU).isnan().all()

    def test_freed_memory_is_nan(self) -> None:
        tensor = torch.ones(64, device=EMU)
        address = tensor.data_ptr()
        assert ctypes.string_at(address, 4) == b"\x00\x00\x80\x3f"
        del tensor
        assert ctypes.string_at(address, 256) == b"\xff" * 256  # the block freed last is kept for this look

    def test_released_memory_reads_as_nan_and_refuses_writes(self) -> None:
        tensor = torch.ones(4, device=EMU)
        tensor.untyped_storage().resize_(0)
        assert (tensor + 1).isnan().all()
        assert tensor.view(2, 2).shape == (2, 2)
        with pytest.raises(RuntimeError, match="released memory"):
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="released memory"):
            tensor.copy_(torch.ones(4))
        tensor.untyped_storage().resize_(16)
        assert tensor.isnan().all()


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda device, host: device + host,
    "add, host first": lambda device, host: host + device,
    "matmul": lambda device, host: device @ host,
    "linear": lambda device, host: F.linear(device, host),
    "cat": lambda device, host: torch.cat([device, host]),
    "where": lambda device, host: torch.where(host > 0, device, device),
    "conv1d": lambda device, host: F.conv1d(device, host[..., None]),
    "add_ into the host": lambda device, host: host.add_(device),
    "out= on the host": lambda device, host: torch.add(device, 1, out=host),
    "embedding": lambda device, host: F.embedding(host.long(), device),
    "foreach": lambda device, host: torch._foreach_add([device], [host]),
}


class TestDevices:
    @pytest.mark.parametrize("name", MIXED)
    def test_mixing_devices_raises(self, name: str) -> None:
        with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device|result of device emu"):
            MIXED[name](torch.ones(3, 3, device=EMU), torch.ones(3, 3))

    def test_a_host_number_may_meet_a_device_tensor(self) -> None:
        total = torch.ones(3, device=EMU) * torch.tensor(2.0)
        assert total.device == torch.device(EMU) and total.tolist() == [2, 2, 2]

    def test_a_device_number_cannot_be_written_into_a_host_number(self) -> None:
        with pytest.raises(RuntimeError, match="device"):
            torch.zeros(()).add_(torch.ones((), device=EMU))

    def test_host_indices_may_pick_from_a_device_tensor(self) -> None:
        table = torch.arange(4, device=EMU)
        assert table[torch.tensor([2, 0])].tolist() == [2, 0]
        table[torch.tensor([1])] = 9
        assert table.tolist() == [0, 9, 2, 3]

    def test_a_gradient_on_the_wrong_device_is_refused(self) -> None:
        parameter = nn.Parameter(torch.ones(2))
        with pytest.raises(RuntimeError, match="device"):
            parameter.grad = torch.ones(2, device=EMU)


class TestIdentity:
    def test_module_to_keeps_parameters_and_ties(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        before = [id(parameter) for parameter in model.parameters()]
        model.to(EMU)
        assert [id(parameter) for parameter in model.parameters()] == before
        assert model[1].weight is model[0].weight
        assert {parameter.device for parameter in model.parameters()} == {torch.device(EMU)}
        model.to("cpu")
        assert [id(parameter) for parameter in model.parameters()] == before

    def test_an_optimizer_made_before_to_steps_the_live_parameters(self) -> None:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.to(EMU)
        before = model.weight.detach().clone()
        model(torch.ones(1, 3, device=EMU)).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight.detach(), before - 1)

    def test_data_of_a_host_parameter_can_be_moved_in_place(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        alias = parameter
        parameter.data = parameter.data.to(EMU)
        assert alias is parameter and alias.device == torch.device(EMU) and alias.is_leaf

    def test_views_see_each_others_writes_and_share_a_version(self) -> None:
        base = torch.zeros(2, 3, device=EMU)
        view = base.view(6)
        base[1].fill_(5)
        assert view.tolist() == [0, 0, 0, 5, 5, 5]
        assert view._version == base._version == 1
        assert torch.zeros(0, device=EMU).set_(base).untyped_storage().data_ptr() == base.untyped_storage().data_ptr()

    def test_out_grows_to_its_result(self) -> None:
        out = torch.empty(0, device=EMU)
        torch.add(torch.ones(3, device=EMU), 1, out=out)
        assert out.tolist() == [2, 2, 2]

    def test_deepcopy_and_save_keep_the_device(self) -> None:
        model = nn.Linear(2, 2).to(EMU)
        twin = copy.deepcopy(model)
        assert twin.weight.device == torch.device(EMU) and torch.equal(twin.weight, model.weight)
        assert twin.weight.untyped_storage().data_ptr() != model.weight.untyped_storage().data_ptr()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        for where in (EMU, "cpu"):
            file.seek(0)
            loaded = torch.load(file, map_location=where)["weight"]
            assert loaded.device == torch.device(where) and torch.equal(loaded.cpu(), model.weight.detach().cpu())


class TestThreadsAndStreams:
    def test_gradient_hooks_run_on_autograds_thread(self) -> None:
        threads: list[int] = []
        leaf = torch.ones(2, device=EMU, requires_grad=True)
        leaf.register_hook(lambda _: threads.append(threading.get_ident()))
        leaf.register_post_accumulate_grad_hook(lambda _: threads.append(threading.get_ident()))
        (leaf * 2).sum().backward()
        assert len(threads) == 2 and threading.get_ident() not in threads

    def test_an_error_in_a_hook_reaches_the_caller_and_the_next_backward_works(self) -> None:
        leaf = torch.ones(2, device=EMU, requires_grad=True)

        def fail(_: Tensor) -> None:
            raise KeyError("from the hook")

        handle = leaf.register_hook(fail)
        with pytest.raises(KeyError, match="from the hook"):
            leaf.sum().backward()
        handle.remove()
        leaf.sum().backward()
        assert leaf.grad is not None and leaf.grad.tolist() == [1, 1]

    def test_streams_and_events_work_and_are_synchronous(self) -> None:
        default, side = torch.accelerator.current_stream(), torch.Stream(EMU)
        assert side != default and side != torch.Stream(EMU)
        start, end = torch.Event(EMU, enable_timing=True), torch.Event(EMU, enable_timing=True)
        with side:
            assert torch.accelerator.current_stream() == side
            start.record()
            copied = torch.ones(4).to(EMU, non_blocking=True)
            copied.record_stream(side)
            end.record(side)
        assert torch.accelerator.current_stream() == default
        default.wait_event(end)
        end.wait(default)
        end.synchronize()
        side.synchronize()
        torch.accelerator.synchronize()
        assert end.query() and side.query() and start.elapsed_time(end) > 0
        assert copied.tolist() == [1, 1, 1, 1]

    def test_the_current_stream_belongs_to_its_thread(self) -> None:
        seen: list[torch.Stream] = []
        with torch.Stream(EMU):
            thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream()))
            thread.start()
            thread.join()
            assert seen[0] != torch.accelerator.current_stream()


class TestLoading:
    def test_without_a_compiler_the_reason_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(EmuUnavailable, match=r"no C\+\+ compiler \('no-such-compiler' is not on PATH"):
            loader._compile("never_built")

    def test_without_ninja_the_reason_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EmuUnavailable, match="ninja is not installed"):
            loader._find_ninja()

    def test_a_failed_build_says_the_compilers_errors_only(self) -> None:
        log = "Error building\n" + "In file included\n" * 50 + "a.cpp:1: error: no member x\nnote: because"
        assert loader._first_errors(log) == "a.cpp:1: error: no member x"

    @pytest.mark.slow
    def test_loading_after_the_first_backward_is_refused_with_the_reason(self) -> None:
        code = (
            "import torch; torch.ones((), requires_grad=True).backward()\n"
            "from tests import emu\n"
            "try: emu.load()\n"
            "except emu.EmuUnavailable as reason: print(reason)\n"
        )
        done = run_code(code, folder=Path(__file__).parents[2])
        assert "a backward pass ran in this process before the device was loaded" in done.stdout, done.stderr
