"""Choosing torch's fused CPU kernels for the user: they run at memory speed, the default loop is 6-20 times slower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = ["FusedChoice", "left_open", "sparsely_differentiated", "wants_fused"]

_HAVE_FUSED_CPU_KERNELS = (Adam, AdamW, SGD, Adagrad)
_left_open: WeakKeyDictionary[Optimizer, frozenset[int]] = WeakKeyDictionary()


def left_open(optimizer: Optimizer) -> frozenset[int]:
    """Numbers of the groups whose user left the choice of kernels open, and which run fused ones because of us."""
    return _left_open.get(optimizer, frozenset())


class FusedChoice:
    """Turns fused kernels on where the user left the choice open, and remembers where.

    Not bit-equal to the loop over tensors, so it is for devices where the ordinary run would have used another kernel
    anyway. Subclasses of torch's optimizers keep what they have: their ``step`` may rely on it.
    """

    def __init__(self) -> None:
        self._left_open: WeakKeyDictionary[Optimizer, frozenset[int]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[FusedChoice], tuple[()]]:
        return FusedChoice, ()  # a copy knows nothing of other processes' optimizers

    def choose(self, optimizer: Optimizer, *, sparse: Iterable[Tensor] = ()) -> bool:
        """Turn the fused kernels on where torch has them; say whether any parameter group changed.

        Args:
            optimizer: one whose groups are as its user made them, or as they were loaded.
            sparse: parameters that will have sparse gradients, for which there are no fused kernels.
        """
        if type(optimizer) not in _HAVE_FUSED_CPU_KERNELS:
            return False
        unfit = {id(parameter) for parameter in sparse}
        changed = frozenset(
            index
            for index, group in enumerate(optimizer.param_groups)
            if group.get("fused", False) is None and not _excludes_fused(group, unfit)
        )
        for index in changed:
            optimizer.param_groups[index]["fused"] = True
        if changed:
            optimizer._need_device_dtype_check_for_fused = True  # type: ignore[attr-defined]  # as constructors do
            self._left_open[optimizer] = _left_open[optimizer] = changed
        return bool(changed)

    def give_back(self) -> None:
        """Leave the choice open again in all optimizers: before they load a state, and when the run is over."""
        for optimizer, indices in self._left_open.items():
            for index in indices:
                optimizer.param_groups[index]["fused"] = None
            _left_open.pop(optimizer, None)
        self._left_open.clear()

    def users_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict with the user's own choice of kernels, for checkpoints that load elsewhere."""
        left_open = self._left_open.get(optimizer, frozenset[int]())
        groups = [
            {**group, "fused": None} if index in left_open else group
            for index, group in enumerate(state["param_groups"])
        ]
        return {**state, "param_groups": groups}


def wants_fused(setting: bool | str, device: torch.device, *, scales: bool) -> bool:
    """Whether optimizers should use fused kernels.

    Args:
        setting: the option ``fused_optimizer``.
        scales: a gradient scaler looks at gradients; it treats fused optimizers otherwise.
    """
    if setting == "auto":
        return device.type in ("cuda", "xpu") and not scales
    return bool(setting)


def sparsely_differentiated(root: nn.Module) -> list[Tensor]:
    """Return the tables of embeddings that ask for sparse gradients.

    >>> [tuple(weight.shape) for weight in sparsely_differentiated(nn.Embedding(3, 2, sparse=True))]
    [(3, 2)]
    """
    tables = (nn.Embedding, nn.EmbeddingBag)
    return [module.weight for module in root.modules() if isinstance(module, tables) and module.sparse]


def _excludes_fused(group: dict[str, Any], unfit: set[int]) -> bool:
    """Whether options or parameters of a group rule the fused kernels out."""
    if group.get("foreach") or group.get("differentiable") or group.get("capturable"):
        return True
    return any(
        id(parameter) in unfit or parameter.device.type != "cpu" or not torch.is_floating_point(parameter)
        for parameter in group["params"]
    )
