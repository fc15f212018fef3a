"""Counts the device bytes that operations create and that are still alive, on any device, without its allocator."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
)

__all__ = ["LiveBytes"]

_HOLDS_NONE = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts storages created by operations on some type of device, until each of them dies.

    A storage counts once, whatever views share it; one that an operation was given, and so did not create, does not
    count, nor do workspaces inside kernels and tensors without one storage (sparse ones). Storages are held weakly and
    the count goes on after the mode has ended. Autograd carries the mode to its own threads. No number changes.

    Args:
        device_types: such as ``"cuda"`` or ``"cpu"``; with several, all together.
        exclude: ``data_ptr()`` of storages that are accounted for elsewhere (slots).

    Cost: some ten microseconds per operation; meant for one step in a run.

    >>> with LiveBytes("cpu") as live:
    ...     x = torch.zeros(8) + 1
    >>> live.current_bytes, live.peak_bytes
    (32, 64)
    """

    # Compiled regions and higher-order operations run as they do without the mode, else numbers could change.
    supports_higher_order_operators = True

    def __init__(self, *device_types: str, exclude: Iterable[int] = ()) -> None:
        """Start at zero bytes; nothing is counted before the mode is entered."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_types = frozenset(device_types)
        self.exclude = set(exclude)
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        # Finalizers run anywhere, even in the middle of our own code: they take no lock, they only queue.
        self._dead: deque[int] = deque()
        self._current = 0
        self._peak = 0
        self._recent_peak = 0
        self._apart: set[int] = set()  # storages that count in all, but not in the rest
        self._apart_bytes = self._recent_rest = 0
        self._has_run = False  # an operation, since the rest was asked for
        self._saved: set[int] = set()  # storages that autograd holds
        self._let_go_bytes = self._recent_unfreed = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled regions compiled."""
        return True

    @property
    def current_bytes(self) -> int:
        """Bytes alive now."""
        with self._lock:
            self._bury()
            return self._current

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once so far."""
        return self._peak

    def take_recent_peak(self) -> int:
        """Return the most bytes alive at once since the last call (or the start), for samples between operations."""
        with self._lock:
            self._bury()
            recent, self._recent_peak = self._recent_peak, self._current
            return recent

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor in all, but from now on not in the rest."""
        with self._lock:
            self._bury()
            for storage in _storages(tensor):
                if (key := _key(storage)) in self._sizes and key not in self._apart:
                    self._apart.add(key)
                    self._apart_bytes += self._sizes[key]
            if not self._has_run:
                self._recent_rest = self._current - self._apart_bytes
                self._recent_unfreed = self._recent_rest + self._let_go_bytes

    def take_recent_rest(self) -> tuple[int, int]:
        """Return bytes without what was set apart: the most since the last call (or the start), and now."""
        with self._lock:
            self._bury()
            now = self._current - self._apart_bytes
            recent, self._recent_rest, self._has_run = self._recent_rest, now, False
            return recent, now

    def note_saved(self, tensor: torch.Tensor) -> None:
        """Autograd holds the storage of a tensor: see :meth:`take_recent_unfreed`."""
        with self._lock:
            self._bury()
            self._saved.update(key for storage in _storages(tensor) if (key := _key(storage)) in self._sizes)

    def take_recent_unfreed(self) -> int:
        """Return the most bytes there would have been since the last call, had nothing that was saved died since.

        What was set apart does not count.
        """
        with self._lock:
            self._bury()
            recent, self._let_go_bytes = self._recent_unfreed, 0
            self._recent_unfreed = self._current - self._apart_bytes
            return recent

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Stop counting the storage of a tensor, which is accounted for elsewhere from now on."""
        with self._lock:
            self._bury()
            for storage in _storages(tensor):
                self._forget(_key(storage))

    def counts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage is one of those that count."""
        return any(_key(storage) in self._sizes for storage in _storages(tensor))

    def follow(self, outputs: Any, since: int) -> None:
        """Count in the backward pass of these tensors as well, whoever starts it: in each node, while it runs.

        Args:
            outputs: tensors, nested in any way.
            since: autograd's sequence number when the computation began; nodes from before are left alone.
        """
        for node in _nodes(outputs, since):
            # Autograd gives every node the modes of its caller and takes back what the node has changed, so that an
            # exception leaves nothing behind; the mode's own __enter__ would leave global flags.
            node.register_prehook(lambda _: _push_mode(self))
            node.register_hook(lambda *_: _pop())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count the storages it created."""
        kwargs = kwargs or {}
        # torch.tensor(...) builds its storage unseen and hands it to lift_fresh: that one is new.
        given = set() if func is torch.ops.aten.lift_fresh.default else {_key(s) for s in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        with self._lock:
            self._bury()
            for storage in _storages(result):
                self._count(storage, given)
            self._peak = max(self._peak, self._current)
            self._recent_peak = max(self._recent_peak, self._current)
            self._has_run = True
            rest = self._current - self._apart_bytes
            self._recent_rest = max(self._recent_rest, rest)
            self._recent_unfreed = max(self._recent_unfreed, rest + self._let_go_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """Add one storage unless it is foreign, or note that a known one changed its size."""
        key = _key(storage)
        if key in self._sizes:
            self._current += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            return
        if key in given or storage.device.type not in self.device_types or storage.data_ptr() in self.exclude:
            return
        self._sizes[key] = storage.nbytes()
        self._current += storage.nbytes()
        weakref.finalize(storage, self._dead.append, key).atexit = False

    def _bury(self) -> None:
        """Subtract the storages that died since the last look; their keys may be used again only after this."""
        while self._dead:
            self._forget(self._dead.popleft())

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self._current -= size
        if key in self._apart:
            self._apart.discard(key)
            self._apart_bytes -= size
        if key in self._saved:
            self._saved.discard(key)
            self._let_go_bytes += size


def _nodes(outputs: Any, since: int) -> Iterator[Any]:
    """Yield the nodes below the outputs that were made since, each once; those of leaves keep no number."""
    roots = [leaf.grad_fn for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    found, waiting = set(), roots
    while waiting:
        node = waiting.pop()
        if node is None or node in found or hasattr(node, "variable") or node._sequence_nr() < since:
            continue
        found.add(node)
        yield node
        waiting += [below for below, _ in node.next_functions]


def _pop() -> None:
    _pop_mode()


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages in nested arguments or results, those inside wrapper subclasses included."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            waiting += [getattr(value, name) for name in names]
        elif isinstance(value, torch.Tensor):
            if value.layout is torch.strided:
                with contextlib.suppress(NotImplementedError):  # inside torch.func a wrapper has none
                    yield value.untyped_storage()
        elif isinstance(value, torch.UntypedStorage):
            yield value
        elif type(value) in (tuple, list):  # what operators take and give; the walk over trees takes twice as long
            waiting += value
        elif not isinstance(value, _HOLDS_NONE) and not pytree.tree_is_leaf(value):
            waiting += pytree.tree_leaves(value)


def _key(storage: torch.UntypedStorage) -> int:
    """Return the address of the storage object, unique among living ones, also where the memory is empty."""
    return int(storage._cdata)
