"""Build, load and steer the emulated device."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import torch

_SOURCES = Path(__file__).parent / "csrc"


class EmuUnavailable(unittest.SkipTest):
    """The emulated device cannot be had here; pytest reports a test or file that meets this as skipped."""


class _Library(Protocol):
    """What ``csrc/runtime.cpp`` exports; all sizes are bytes."""

    def used_bytes(self) -> int: ...
    def peak_bytes(self) -> int: ...
    def reset_peak(self) -> None: ...
    def set_capacity(self, num_bytes: int) -> None: ...
    def pinned_bytes(self) -> int: ...


def load() -> torch.device:
    """Build (20 to 40 s, cached in ``TORCH_EXTENSIONS_DIR``), load and register the device, once per process.

    Call it before the first backward pass of the process: autograd starts one thread per device then, and none later.
    ``tests/conftest.py`` does so for every test that uses the fixture ``emu`` or carries the mark.

    Returns:
        ``torch.device("emu:0")``.
    Raises:
        EmuUnavailable: no compiler, no ninja, the build failed, or autograd started without the device.
    """
    _library()
    return torch.device("emu", 0)


def is_loaded() -> bool:
    """Whether the device is there, without building it."""
    return _load_once.cache_info().currsize > 0 and not isinstance(_load_once(), EmuUnavailable)


def used_bytes() -> int:
    """Bytes of device memory in use: the sum of the sizes of all storages, without any rounding."""
    return _library().used_bytes()


def peak_bytes() -> int:
    """The most bytes in use at once since the last :func:`reset_peak`."""
    return _library().peak_bytes()


def reset_peak() -> None:
    """Start measuring the peak anew, from what is in use now."""
    _library().reset_peak()


def set_capacity(num_bytes: int | None) -> None:
    """Let allocations beyond ``num_bytes`` in all raise ``torch.OutOfMemoryError``; None takes the limit away."""
    if num_bytes is not None and num_bytes < 0:
        raise ValueError(f"got a capacity of {num_bytes} bytes, allowed are 0 and more, or None for no limit")
    _library().set_capacity(-1 if num_bytes is None else num_bytes)


@contextlib.contextmanager
def capacity(num_bytes: int) -> Iterator[None]:
    """Limit the device to ``num_bytes`` within a ``with`` block."""
    set_capacity(num_bytes)
    try:
        yield
    finally:
        set_capacity(None)


def pinned_bytes() -> int:
    """Bytes of host memory pinned through this device (``tensor.pin_memory()``, ``pin_memory=True``)."""
    return _library().pinned_bytes()


def _library() -> _Library:
    library = _load_once()
    if isinstance(library, EmuUnavailable):
        raise EmuUnavailable(str(library))
    return library


@functools.cache
def _load_once() -> _Library | EmuUnavailable:
    """Load at the first call; a failure is remembered, so that a hundred tests do not build a hundred times."""
    try:
        library = _build()
        _register()
        _check_autograd_thread()
    except EmuUnavailable as reason:
        return reason
    return library


def _build() -> _Library:
    """Import the cached library, compile it first where there is none yet."""
    from torch.utils import cpp_extension

    name = _library_name()
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    complete = folder / "complete"  # written after a whole build: a killed one may leave half a library
    with _one_build_at_a_time(folder):
        if not complete.exists():
            _compile(name)
            complete.touch()
        return _import(name, folder / f"{name}.so")


def _library_name() -> str:
    """Name the library after all that it is made of.

    One cache serves every checkout and every version of torch, and nobody rebuilds what another one built.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"lightning_superpipe_emu_{digest.hexdigest()[:16]}"


def _import(name: str, path: Path) -> _Library:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise EmuUnavailable(f"emulated device: {path} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(_Library, module)


def _compile(name: str) -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise EmuUnavailable(f"emulated device: no C++ compiler ({compiler!r} is not on PATH; set CXX to another)")
    _find_ninja()
    # cpp_extension imports setuptools only when it builds: name what is missing here.
    if importlib.util.find_spec("setuptools") is None:
        raise EmuUnavailable("emulated device: setuptools is not installed, torch builds extensions with it")
    sources = sorted(str(path) for path in _SOURCES.glob("*.cpp"))
    try:
        cpp_extension.load(name, sources, extra_cflags=["-O1"], is_python_module=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise EmuUnavailable(f"emulated device: the build failed: {_first_errors(str(error))}") from error


def _first_errors(log: str) -> str:
    """Return what a compiler's log of thousands of lines has to say, in a few lines."""
    lines = log.splitlines()
    return "\n".join([line for line in lines if "error:" in line][:3] or lines[:3])


def _find_ninja() -> None:
    if shutil.which("ninja") is not None:
        return
    # Installed by pip, but the interpreter was called by its path: the environment's bin folder is not on PATH.
    spec = importlib.util.find_spec("ninja")
    if spec is None:
        raise EmuUnavailable("emulated device: ninja is not installed (pip install ninja)")
    import ninja

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


@contextlib.contextmanager
def _one_build_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock that dies with its process; torch's own lock file outlives a killed build and blocks for ever."""
    with (folder / "build.flock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _register() -> None:
    from torch.utils import backend_registration

    from tests.emu import device_module

    backend_registration.rename_privateuse1_backend("emu")
    torch._register_device_module("emu", device_module)  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)


def _check_autograd_thread() -> None:
    number = torch.ones((), device="emu", requires_grad=True)
    try:
        number.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise EmuUnavailable(
            "emulated device: a backward pass ran in this process before the device was loaded, so autograd has no "
            "thread for it. Use the fixture `emu` or the mark `emu`, or call tests.emu.load() first."
        ) from error
