"""Accelerate: ``SuperpipeAccelerator(superpipe=...)``, or :func:`enable` for an accelerator that exists already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.checkpoint import own_memory, reading_pages
from lightning_superpipe.adapters.disk import Advice
from lightning_superpipe.adapters.drafts import Shelter
from lightning_superpipe.adapters.materialize import refuse_meta
from lightning_superpipe.adapters.updating import updating
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import ConfigError, SuperpipeError, UnsupportedError
from lightning_superpipe.moving import bring_home
from lightning_superpipe.observe.report import Report
from lightning_superpipe.session import FusedChoice, Session, UnitTable, sparsely_differentiated, wants_fused

__all__ = ["SuperpipeAccelerator", "config_of", "enable"]

_ADVICE = Advice("save_state(output_dir)", "fewer registered objects")
_PLUGINS = ("deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin", "megatron_lm_plugin")
_NUMBERED = re.compile(r"checkpoint_(\d+)")
_WRITTEN = re.compile(  # by save_state; what an earlier one left of these would mix with the new
    r"(model|pytorch_model)(_\d+)?\.(safetensors|bin)|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin"
    r"|scaler\.pt|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
)


class SuperpipeAccelerator(Accelerator):  # type: ignore[misc]  # accelerate ships no types
    """An Accelerator whose models stream; every other method and file format is Accelerate's own.

    Models are prepared where they are, on the host, and come back without a wrapper. ``prepare`` takes objects in any
    order and any number of models; ``free_memory`` gives them back as ordinary modules. A save that is killed leaves
    the state saved before it whole.

    Args:
        superpipe: options of :class:`~lightning_superpipe.SuperpipeConfig`, as one or as a mapping.
        arguments: those of :class:`accelerate.Accelerator`.

    Raises:
        ConfigError: an option is unknown or impossible.
        UnsupportedError: several processes or devices, DeepSpeed, FSDP or Megatron plugins, fp8.
    """

    keeps_references = False  # through free_memory: Trainers call it before they train, and prepare no reference again
    _superpipe: SuperpipeConfig
    _sessions: list[Session]
    _fused: FusedChoice

    def __init__(self, *, superpipe: SuperpipeConfig | Mapping[str, Any] | None = None, **arguments: Any) -> None:
        config = config_of(superpipe)
        if plugins := [name for name in _PLUGINS if arguments.get(name) is not None]:
            raise UnsupportedError(  # Accelerate drops them without a word where there is one process
                f"{plugins[0]} shards the model over processes; superpipe streams it through one device instead: "
                f"leave {plugins[0]} out."
            )
        super().__init__(**arguments)
        _take_over(self, config)

    # -- Accelerate's seams

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Stream a model instead of moving it; ``device_placement`` has no meaning here."""
        if getattr(model, "_is_accelerate_prepared", False) and self.session_of(model) is not None:
            prepared: nn.Module = super().prepare_model(model, False, evaluation_mode)
            return prepared
        _refuse_quantised(model)
        refuse_meta(model)
        bring_home(model, self._own_optimizers())
        if self.session_of(model) is None:
            self._open(model, self._superpipe, trains=not evaluation_mode)
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
        for session in [each for each in self._sessions if each.is_open]:
            session.attend(self._own_optimizers())
        return prepared

    def free_memory(self, *objects: Any) -> Any:
        """Give all models back as they were, with their current weights, then do what Accelerate does."""
        kept = [session for session in self._sessions if self.keeps_references and not session.trains]
        while self._sessions:
            if (session := self._sessions.pop()) not in kept:
                session.close()
        self._sessions += kept
        self._fused.give_back()
        return super().free_memory(*objects)

    def save_state(self, output_dir: Any = None, safe_serialization: bool = True, **options: Any) -> Any:
        """Save as Accelerate does, into a hidden folder that then takes the place of ``output_dir``.

        Hooks get the hidden folder. What else is in ``output_dir`` stays there. With automatic checkpoint naming the
        oldest checkpoints beyond ``total_limit`` go after the new one is there, not before.

        Raises:
            SuperpipeError: the disk refused; what was there before is as it was.
            ConfigError: automatic naming leads to a checkpoint that exists.
        """
        project = self.project_configuration
        is_automatic = project.automatic_checkpoint_naming
        if output_dir is None and not is_automatic:
            return super().save_state(output_dir, safe_serialization, **options)
        target = self._next_checkpoint() if is_automatic else Path(output_dir)
        shelter = self._shelter_of(target)
        with shelter.replacing(target.resolve().name, _WRITTEN) as draft, self.users_kernels():
            project.automatic_checkpoint_naming = False  # the name has been found
            try:
                super().save_state(str(draft), safe_serialization, **options)
            finally:
                project.automatic_checkpoint_naming = is_automatic
        if is_automatic and project.total_limit is not None:
            for folder in _numbered(target.parent)[: -max(project.total_limit, 1)]:
                shelter.discard(folder.name)
        return target

    def load_state(self, input_dir: Any = None, load_kwargs: Any = None, **options: Any) -> None:
        """Load as Accelerate does, page by page; a replacement that a kill interrupted is finished first.

        Objects registered for checkpointing get tensors that are pages of their file until somebody writes to them.
        """
        if input_dir is not None:
            self._shelter_of(Path(input_dir).expanduser()).recover()
        elif self.project_configuration.automatic_checkpoint_naming:
            checkpoints = Path(self.project_dir, "checkpoints")
            self._shelter_of(checkpoints / "checkpoint_0").recover()
            input_dir = next(iter(_numbered(checkpoints)[-1:]), None)  # names without a number would end the search
        with self.users_kernels(), reading_pages(input_dir):
            super().load_state(None if input_dir is None else str(input_dir), load_kwargs, **options)
            own_memory(self._optimizers)

    def _next_checkpoint(self) -> Path:
        folder = Path(self.project_dir, "checkpoints")
        target = folder / f"checkpoint_{self.save_iteration}"
        if target.exists():
            free = 1 + max(int(each.name.split("_")[1]) for each in _numbered(folder))
            raise ConfigError(
                f"automatic checkpoint naming leads to {str(target)!r}, which exists. After a resumption say where to "
                f"go on: accelerator.project_configuration.iteration = {free}."
            )
        return target

    def _shelter_of(self, target: Path) -> Shelter:
        """Where a target's draft is written: beside the folder in which Accelerate takes all for checkpoints."""
        home = target.resolve().parent
        if self.project_configuration.automatic_checkpoint_naming:
            return Shelter(home, home.parent / f".superpipe-{home.name}", _ADVICE)
        return Shelter(home, home / f".superpipe-{target.resolve().name}", _ADVICE)

    @contextmanager
    def users_kernels(self) -> Iterator[None]:
        """Leave the choice of optimizer kernels open, as it stands in files that load elsewhere."""
        self._fused.give_back()
        try:
            yield
        finally:
            for optimizer in self._own_optimizers():
                self._choose_fused(optimizer)

    # -- what users ask

    def updating(self, optimizer: Any) -> AbstractContextManager[None]:
        """Scope of a backward pass and the step after it, a promise that nobody touches gradients in between.

        ::

            with accelerator.updating(optimizer):
                accelerator.backward(loss)
                optimizer.step()

        As :meth:`Pipe.updating`; it does nothing where gradients are scaled, or still accumulate.
        """
        if self.scaler is not None or not self.sync_gradients:
            return nullcontext()
        return updating(self._sessions, optimizer)

    def report(self, index: int = 0) -> Report:
        """What streaming cost and saved, for the model that was prepared as number ``index``.

        Raises:
            SuperpipeError: no such model.
        """
        return self._session_at(index).report()

    def units(self, index: int = 0) -> UnitTable:
        """Units and anchors of the model that was prepared as number ``index``, as a table that prints."""
        return self._session_at(index).units

    def report_of(self, model: nn.Module) -> Report:
        """What streaming a prepared model cost and saved.

        Raises:
            SuperpipeError: it was not prepared, or has been given back.
        """
        sessions = [session for session in self._sessions if session.is_of(model)]
        if not sessions:
            raise SuperpipeError("the model is not prepared: nothing has run yet, or free_memory() gave it back.")
        return sessions[-1].report()

    def _session_at(self, index: int) -> Session:
        if index >= len(self._sessions):
            raise SuperpipeError(f"model {index} was asked for, but {len(self._sessions)} were prepared.")
        return self._sessions[index]

    def session_of(self, model: nn.Module) -> Session | None:
        """The session of a prepared model; None if it is not prepared."""
        return next((session for session in self._sessions if session.streams(model)), None)

    def _open(self, model: nn.Module, config: SuperpipeConfig, *, trains: bool) -> Session:
        session = Session(model, config, self.device, trains=trains, owns_root=True)
        session.attend(self._own_optimizers())
        session.on_aside = self._fused.give_back
        self._sessions.append(session)
        return session

    def stream_again(self, model: nn.Module) -> Session:
        """Stream a model for good that has been streamed before, and is on the device now."""
        bring_home(model, self._own_optimizers())
        session = self._open(model, replace(self._superpipe, step_aside=False), trains=True)
        for optimizer in self._own_optimizers():
            self._choose_fused(optimizer)
        return session

    def _own_optimizers(self) -> list[Optimizer]:
        return [getattr(each, "optimizer", each) for each in self._optimizers]

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


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints with automatic names, oldest first."""
    found = [each for each in folder.glob("checkpoint_*") if _NUMBERED.fullmatch(each.name)]
    return sorted(found, key=lambda each: int(each.name.split("_")[1]))


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
