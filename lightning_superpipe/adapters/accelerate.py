"""Accelerate: ``SuperpipeAccelerator(superpipe=...)``, or :func:`enable` for an accelerator that exists already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.plain import bring_home
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError, UnsupportedError
from lightning_superpipe.observe.report import Report
from lightning_superpipe.session import FusedChoice, Session, UnitTable, sparsely_differentiated, wants_fused

__all__ = ["SuperpipeAccelerator", "config_of", "enable"]


class SuperpipeAccelerator(Accelerator):  # type: ignore[misc]  # accelerate ships no types
    """An Accelerator whose models stream; every other method and file format is Accelerate's own.

    Models are prepared where they are, on the host, and come back without a wrapper. ``prepare`` takes objects in any
    order and any number of models; ``free_memory`` gives them back as ordinary modules.

    Args:
        superpipe: options of :class:`~lightning_superpipe.SuperpipeConfig`, as one or as a mapping.
        arguments: those of :class:`accelerate.Accelerator`.

    Raises:
        ConfigError: an option is unknown or impossible.
        UnsupportedError: several processes or devices, DeepSpeed, FSDP or Megatron plugins, fp8.
    """

    _superpipe: SuperpipeConfig
    _sessions: list[Session]
    _fused: FusedChoice

    def __init__(self, *, superpipe: SuperpipeConfig | Mapping[str, Any] | None = None, **arguments: Any) -> None:
        config = config_of(superpipe)
        super().__init__(**arguments)
        _take_over(self, config)

    # -- Accelerate's seams

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Stream a model instead of moving it; ``device_placement`` has no meaning here."""
        if getattr(model, "_is_accelerate_prepared", False) and self._session_of(model) is not None:
            prepared: nn.Module = super().prepare_model(model, False, evaluation_mode)
            return prepared
        _refuse_quantised(model)
        bring_home(model, ())
        if self._session_of(model) is None:
            session = Session(model, self._superpipe, self.device, trains=not evaluation_mode, owns_root=True)
            session.attend([getattr(each, "optimizer", each) for each in self._optimizers])
            self._sessions.append(session)
        prepared = super().prepare_model(model, False, evaluation_mode)
        if prepared is not model:
            raise UnsupportedError(
                f"{type(prepared).__name__} wraps the prepared model, which superpipe cannot stream: leave out "
                "torch.compile (dynamo_backend) and distributed plugins."
            )
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """Keep an optimizer's states on the host, where its parameters are."""
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            bring_home(nn.Module(), [optimizer])
            self._choose_fused(optimizer)
        prepared = super().prepare_optimizer(optimizer, False)
        for session in self._sessions:
            session.attend([getattr(each, "optimizer", each) for each in self._optimizers])
        return prepared

    def free_memory(self, *objects: Any) -> Any:
        """Give all models back as they were, with their current weights, then do what Accelerate does."""
        while self._sessions:
            self._sessions.pop().close()
        self._fused.give_back()
        return super().free_memory(*objects)

    # -- what users ask

    def report(self, index: int = 0) -> Report:
        """What streaming cost and saved, for the model that was prepared as number ``index``.

        Raises:
            SuperpipeError: no such model.
        """
        return self._session_at(index).report()

    def units(self, index: int = 0) -> UnitTable:
        """Units and anchors of the model that was prepared as number ``index``, as a table that prints."""
        return self._session_at(index).units

    def _session_at(self, index: int) -> Session:
        if index >= len(self._sessions):
            raise SuperpipeError(f"model {index} was asked for, but {len(self._sessions)} were prepared.")
        return self._sessions[index]

    def _session_of(self, model: nn.Module) -> Session | None:
        return next((session for session in self._sessions if session.streams(model)), None)

    def _choose_fused(self, optimizer: Optimizer) -> None:
        if wants_fused(self._superpipe.fused_optimizer, self.device, scales=self.scaler is not None):
            sparse = [each for model in self._models for each in sparsely_differentiated(model)]
            self._fused.choose(optimizer, sparse=sparse)


def enable(
    accelerator: Accelerator, superpipe: SuperpipeConfig | Mapping[str, Any] | None = None
) -> SuperpipeAccelerator:
    """Turn an accelerator that has prepared no model yet into one that streams; it is the same object.

    Raises:
        ConfigError, UnsupportedError: see :class:`SuperpipeAccelerator`.
        SuperpipeError: it has prepared something already.
    """
    config = config_of(superpipe)
    if accelerator._models or accelerator._optimizers:
        raise SuperpipeError("the accelerator has prepared something already: call enable() before prepare().")
    own: Any = type(accelerator)
    if not issubclass(own, SuperpipeAccelerator):
        streaming: Any = SuperpipeAccelerator
        accelerator.__class__ = streaming if own is Accelerator else type(own.__name__, (streaming, own), {})
    _take_over(accelerator, config)
    return cast(SuperpipeAccelerator, accelerator)


def config_of(superpipe: SuperpipeConfig | Mapping[str, Any] | None) -> SuperpipeConfig:
    """Return the options as a config.

    Raises:
        ConfigError: an option is unknown or impossible.
    """
    return superpipe if isinstance(superpipe, SuperpipeConfig) else SuperpipeConfig.from_options(**(superpipe or {}))


def _take_over(accelerator: Any, config: SuperpipeConfig) -> None:
    """Refuse what cannot work, and add what the subclass needs."""
    kind = accelerator.distributed_type
    if kind != DistributedType.NO or accelerator.num_processes > 1:
        raise UnsupportedError(
            f"superpipe streams through one device in one process, but Accelerate runs {accelerator.num_processes} "
            f"processes as {kind.value}. Launch one (accelerate launch --num_processes 1), without DeepSpeed, FSDP "
            "or Megatron plugins."
        )
    if accelerator.mixed_precision == "fp8":
        raise UnsupportedError("mixed_precision='fp8' replaces layers by stateful ones: use 'no', 'bf16' or 'fp16'.")
    accelerator._superpipe, accelerator._sessions, accelerator._fused = config, [], FusedChoice()


def _refuse_quantised(model: nn.Module) -> None:
    """Say it in transformers' words; the partition would name the first parameter only."""
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_8bit", False):
        method = getattr(model, "quantization_method", None) or "bitsandbytes"
        raise UnsupportedError(
            f"the model is quantised ({method}): its weights cannot be streamed. Load it without quantization_config, "
            "in bfloat16."
        )
