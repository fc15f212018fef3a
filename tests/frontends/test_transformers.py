"""transformers: other Trainer classes, evaluation alone, the best model, generation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from lightning_superpipe import SuperpipeTrainer, SuperpipeTrainerMixin
from lightning_superpipe.errors import ConfigError, SuperpipeError, UnsupportedError
from tests.frontends.story import Story, make_model, texts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
DATA: Any = [{"input_ids": ids, "labels": ids} for ids in texts(Story(num_steps=6))]


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    return kind(str(folder), **{**quiet, "per_device_train_batch_size": 2, **options})


def train(trainer: Any) -> tuple[list[Any], list[torch.Tensor]]:
    trainer.train()
    logged = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return logged, [weight.detach().clone() for weight in trainer.model.parameters()]


def are_equal(left: tuple[list[Any], list[torch.Tensor]], right: tuple[list[Any], list[torch.Tensor]]) -> bool:
    return left[0] == right[0] and all(map(torch.equal, left[1], right[1]))


class StreamedSeq2Seq(SuperpipeTrainerMixin, Seq2SeqTrainer):
    pass


def translator() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    config: Any = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return T5ForConditionalGeneration(config)


def test_mixin_streams_a_sequence_to_sequence_trainer_that_generates(tmp_path: Path) -> None:
    def run(kind: Any, **own: Any) -> Any:
        options = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps", "eval_steps": 2}
        chosen = arguments(tmp_path / kind.__name__, Seq2SeqTrainingArguments, **options)
        trainer = kind(translator(), chosen, train_dataset=DATA, eval_dataset=DATA[:2], **own)
        return train(trainer), trainer.predict(DATA[:2]).predictions.tolist()

    ordinary, written = run(Seq2SeqTrainer)
    streamed, written_too = run(StreamedSeq2Seq, superpipe={"k": 2})
    assert are_equal(streamed, ordinary)
    assert written_too == written


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.1},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=["adafactor", "best model", "schedule", "noise"],
)
def test_options_leave_the_ordinary_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    def run(kind: Any, **own: Any) -> Any:
        chosen = arguments(tmp_path / kind.__name__, **options)
        return train(kind(make_model(Story()), chosen, train_dataset=DATA, eval_dataset=DATA[:2], **own))

    assert are_equal(run(SuperpipeTrainer, superpipe={"k": 2}), run(Trainer))


def test_evaluation_alone_streams(tmp_path: Path) -> None:
    ordinary = Trainer(make_model(Story()), arguments(tmp_path), eval_dataset=DATA).evaluate()
    trainer = SuperpipeTrainer(make_model(Story()), arguments(tmp_path), eval_dataset=DATA, superpipe={"k": 2})
    with pytest.raises(SuperpipeError, match="nothing has run yet"):
        trainer.superpipe_report()
    assert trainer.evaluate()["eval_loss"] == ordinary["eval_loss"]
    assert trainer.superpipe_report().num_loads > 0


@pytest.mark.parametrize("name", ["bf16_full_eval", "torch_compile"])
def test_arguments_that_cannot_be_combined_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        SuperpipeTrainer(make_model(Story()), arguments(tmp_path, **{name: True}), train_dataset=DATA)


def test_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'k_prime'"):
        SuperpipeTrainer(make_model(Story()), arguments(tmp_path), superpipe={"kprime": 2})
