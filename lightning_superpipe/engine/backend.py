"""What the engine must know of a device, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "graph_task_id",
    "hooks_are_allowed",
    "is_on_host",
    "is_separate",
    "is_tracing",
    "raw_tensors",
    "storage_address",
]


def is_separate(device: torch.device) -> bool:
    """Whether device memory is other memory than the host's, so that mixing the two raises."""
    return device.type != "cpu"


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one in host memory; single numbers go with any device."""
    return tensor.device.type == "cpu" and tensor.dim() > 0 and type(tensor) in (Tensor, nn.Parameter)


def graph_task_id() -> int:
    """Number of the backward pass that the calling thread is running; -1 outside backward."""
    return torch._C._current_graph_task_id()


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` or ``torch.export`` is looking at the module: it must see the host's parameters."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return torch._C._get_tracing_state() is not None or fake is not None


def hooks_are_allowed() -> bool:
    """Whether saved-tensor hooks may be used; inside ``torch.func.grad`` and its kin they may not."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def storage_address(tensor: Tensor) -> int | None:
    """Address of a tensor's memory; None for those without (sparse, subclasses, inside ``vmap``)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


@contextlib.contextmanager
def raw_tensors() -> Iterator[None]:
    """Work on tensors below all modes: no autograd, no inference tensors, no user's or our function modes.

    A twin made inside ``inference_mode`` or a ``torch.func`` transform could never be used in training.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
    ):
        yield
