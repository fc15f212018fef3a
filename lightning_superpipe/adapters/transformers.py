"""transformers: ``SuperpipeTrainer``, and a mixin for every class derived from ``Trainer``."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, trainer_utils

from lightning_superpipe.adapters.accelerate import SuperpipeAccelerator, config_of, enable
from lightning_superpipe.adapters.checkpoint import own_memory, reading_pages
from lightning_superpipe.adapters.checks import holds_copies
from lightning_superpipe.adapters.disk import Advice
from lightning_superpipe.adapters.drafts import Shelter
from lightning_superpipe.adapters.ordinary import OrdinarySteps, ordinary_steps
from lightning_superpipe.adapters.repeat import TrainerNotes, repeated_if_too_large
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError, SuperpipeWarning, UnsupportedError
from lightning_superpipe.observe.report import Report
from lightning_superpipe.session import Session

if TYPE_CHECKING:
    _Base: Any
else:
    _Base = object

__all__ = ["SuperpipeTrainer", "SuperpipeTrainerMixin"]

_REFUSED = {
    "fp16_full_eval": "it moves the whole model to the device",
    "bf16_full_eval": "it moves the whole model to the device",
    "torch_compile": "it wraps the whole model; compile the units instead",
}

_FRAMEWORKS = frozenset(("transformers", "trl", "builtins", __name__.partition(".")[0]))
_HARMLESS = frozenset(("compute_loss", "get_train_dataloader", "get_eval_dataloader", "log"))  # overridden by users
_log = logging.getLogger("lightning_superpipe")

_ADVICE = Advice("TrainingArguments(output_dir=...)", "save_only_model=True")
_STATE = "trainer_state.json"  # the last file that a Trainer writes into a checkpoint
_MARK = "checkpoint-is-incomplete.txt"  # of saves on SIGTERM
_WRITTEN = re.compile(  # by Trainers; what an earlier save left of these would mix with the new
    r"(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin|json)|(optimizer|scheduler|scaler)\.pt"
    rf"|rng_state(_\d+)?\.pth|training_args\.bin|{_STATE}|{_MARK}"
)


class SuperpipeTrainerMixin(_Base):  # type: ignore[misc]  # stands before a Trainer class
    """Streams the model of the Trainer class before which it stands.

    ::

        class Mine(SuperpipeTrainerMixin, Seq2SeqTrainer): ...

    Checkpoints are the Trainer's own. A save that is killed leaves those before it whole, and nothing that a
    resumption could take for a checkpoint.

    Args:
        superpipe: options of :class:`~lightning_superpipe.SuperpipeConfig`, as one or as a mapping.
        arguments: those of the Trainer class.

    Raises:
        ConfigError: an option is unknown or impossible.
        UnsupportedError: training arguments that cannot be combined with streaming, by name.
    """

    def __init__(
        self, *arguments: Any, superpipe: SuperpipeConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.superpipe = config_of(superpipe)
        self._draft_folder: Path | None = None  # in which a checkpoint is being written
        self._ordinary: OrdinarySteps | None = None
        super().__init__(*arguments, **options)

    def create_accelerator_and_postprocess(self) -> None:
        """Let the Trainer make its accelerator, and turn it into one that streams."""
        for name, reason in _REFUSED.items():
            if getattr(self.args, name, False):
                raise UnsupportedError(f"TrainingArguments({name}=True) cannot be used with superpipe: {reason}.")
        super().create_accelerator_and_postprocess()
        enable(self.accelerator, self.superpipe).keeps_references = True
        self.args._n_gpu = min(self.args.n_gpu, 1)  # or the Trainer would wrap the model in DataParallel

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model on the host: it streams to the device."""

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """Run forward and backward of one batch, again under a smaller plan where the device had no room for it.

        Raises:
            OutOfDeviceMemory: no smaller plan is left, or gradients of earlier batches have been added to.
        """
        self._step_aside_if_all_fits(model)
        accelerator: SuperpipeAccelerator = self.accelerator
        own: Callable[..., Tensor] = partial(super().training_step, model, *arguments, **options)
        if (session := accelerator.session_of(model)) is not None:
            return repeated_if_too_large(session, own, lambda: TrainerNotes(self))
        return own() if self._ordinary is None else self._ordinary.run(own, lambda: TrainerNotes(self))

    def _step_aside_if_all_fits(self, model: nn.Module) -> None:
        """Let the ordinary run go on, where it fits and nobody else can hold what moves to the device then."""
        accelerator: SuperpipeAccelerator = self.accelerator
        session = accelerator.session_of(model)
        if session is None:
            return
        session.is_asked = True
        if session.guard.attempts.is_open:
            return

        def stream_again() -> Session:
            self._ordinary = None
            return accelerator.stream_again(model)

        self._ordinary = ordinary_steps(
            session,
            model,
            [self.optimizer],
            is_safe=lambda: _runs_undisturbed(self) and not holds_copies(model),
            stream_again=stream_again,
            tell=_log.info,
        )

    def superpipe_report(self) -> Report:
        """What streaming the trained model cost and saved.

        Raises:
            SuperpipeError: nothing has run yet.
        """
        accelerator: SuperpipeAccelerator = self.accelerator
        return accelerator.report_of(self.model)

    # -- checkpoints

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        """Train as the Trainer does; ``resume_from_checkpoint=True`` takes the last checkpoint that is complete.

        Raises:
            SuperpipeError: there are checkpoints to resume from, but none is complete.
        """
        if resume_from_checkpoint is True:
            _shelter_of(self.args.output_dir).recover()
            resume_from_checkpoint = _last_complete(Path(self.args.output_dir)) or True
        elif resume_from_checkpoint:
            _shelter_of(Path(resume_from_checkpoint).resolve().parent).recover()
        return super().train(resume_from_checkpoint, *arguments, **options)

    def _get_output_dir(self, trial: Any) -> str:
        own: str = super()._get_output_dir(trial)
        return own if self._draft_folder is None else str(self._draft_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write into a hidden folder, and put it in its place; push and rotate only then."""
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        shelter = _shelter_of(folder)
        with shelter.replacing(name, _WRITTEN) as draft:
            self._draft_folder = draft.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._draft_folder = None
                self._name_best(folder, name)
            if self.args.should_save:
                self.state.save_to_json(str(draft / _STATE))  # where the best one will be
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            self._rotate(folder, shelter)

    def _name_best(self, folder: Path, name: str) -> None:
        """Say where the best checkpoint is: the Trainer has looked for it beside the draft."""
        best = f"checkpoint-{self.state.best_global_step}"
        is_there = best == name or (folder / best).exists()
        if self.args.save_strategy != trainer_utils.SaveStrategy.NO and self.state.best_global_step and is_there:
            self.state.best_model_checkpoint = str(folder / best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._draft_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _rotate(self, folder: Path, shelter: Shelter) -> None:
        """Delete what is beyond ``save_total_limit``, by the Trainer's rule, each checkpoint at once."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        found = trainer_utils.sort_checkpoints(str(folder), use_mtime=True)
        kept = {found[-1], str(Path(self.state.best_model_checkpoint or found[-1]))}
        doomed = [each for each in found if each not in kept]
        for each in doomed[: max(0, len(found) - max(limit, len(kept)))]:
            shelter.discard(Path(each).name)

    def _finalize_training(self, trial: Any, *arguments: Any, **options: Any) -> Any:
        if self.args.should_save and self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            folder, best = Path(self._get_output_dir(trial)), Path(self.state.best_model_checkpoint).resolve()
            for each in trainer_utils.sort_checkpoints(str(folder)):  # as the Trainer does now, file by file
                if Path(each).resolve() != best:
                    _shelter_of(folder).discard(Path(each).name)
        return super()._finalize_training(trial, *arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.accelerator.users_kernels():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self.accelerator.users_kernels(), reading_pages(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            own_memory([self.optimizer])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *arguments: Any, **options: Any) -> None:
        with reading_pages(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *arguments, **options)

    def _load_best_model(self) -> None:
        with reading_pages(self.state.best_model_checkpoint):
            super()._load_best_model()


class SuperpipeTrainer(SuperpipeTrainerMixin, Trainer):
    """``transformers.Trainer`` with a streamed model; takes ``superpipe=dict(k=4, k_prime=2)`` besides."""


def _runs_undisturbed(trainer: Any) -> bool:
    """Whether all that runs between two steps is the framework's, which holds no tensors of the model's."""
    foreign = [base for base in type(trainer).__mro__ if _package(base) not in _FRAMEWORKS]
    members = [member for base in foreign for member in vars(base).items()]
    own = {name for name, value in members if hasattr(value, "__get__") and not name.startswith("__")}
    callbacks = trainer.callback_handler.callbacks
    return own <= _HARMLESS and all(_package(type(callback)) in _FRAMEWORKS for callback in callbacks)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _shelter_of(folder: str | Path) -> Shelter:
    home = Path(folder).expanduser().resolve()
    return Shelter(home, home / ".superpipe-checkpoint", _ADVICE)


def _last_complete(folder: Path) -> str | None:
    """The last checkpoint of a run that was written to its end; None where there is none at all.

    Raises:
        SuperpipeError: there are some, all incomplete.
    """
    found = trainer_utils.sort_checkpoints(str(folder))
    incomplete: list[str] = []
    while found and not _is_complete(Path(found[-1])):
        incomplete.append(Path(found.pop()).name)
    if not incomplete:
        return found[-1] if found else None
    message = f"of the checkpoints in {str(folder)!r} these were not written to their end: {', '.join(incomplete)}. "
    if not found:
        raise SuperpipeError(f"{message}There is no other to resume from: train without resume_from_checkpoint.")
    warnings.warn(f"{message}Training resumes from {Path(found[-1]).name}.", SuperpipeWarning, stacklevel=3)
    return found[-1]


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not (checkpoint / _MARK).exists()


_SEAMS = (
    "training_step",
    *("create_accelerator_and_postprocess", "_move_model_to_device", "_get_output_dir", "_save_checkpoint"),
    *("_push_from_checkpoint", "_finalize_training", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"),
    *("_load_from_checkpoint", "_load_best_model"),
)
_missing = [name for name in _SEAMS if not hasattr(Trainer, name)]
if _missing:
    raise ImportError(
        f"this version of transformers has no Trainer.{_missing[0]}, which superpipe overrides: "
        "install transformers>=5.3,<6."
    )
