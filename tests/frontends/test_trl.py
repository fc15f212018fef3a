"""TRL: its Trainers stream by the mixin, reference models included, and leave the ordinary numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_superpipe import SuperpipeTrainerMixin

pytest.importorskip("trl", reason="trl is not installed: pip install 'lightning_superpipe[test]'")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WORDS = [f"word{number}" for number in range(20)]
VOCABULARY = {name: number for number, name in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"bf16": False, "gradient_checkpointing": False},
    "checkpointing": {"bf16": False, "gradient_checkpointing": True},
    "bf16": {"bf16": True, "gradient_checkpointing": False},
    "bf16, checkpointing, accumulation": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
}


class StreamedSFT(SuperpipeTrainerMixin, SFTTrainer):
    pass


class StreamedDPO(SuperpipeTrainerMixin, DPOTrainer):
    pass


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48}
    tokens = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_attention_heads=2, attention_dropout=0.1))


def sentence(seed: int, length: int) -> str:
    drawn = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[number] for number in drawn.tolist())


TEXTS = Dataset.from_list([{"text": sentence(seed, 8)} for seed in range(16)])
PAIRS = Dataset.from_list(
    [
        {"prompt": sentence(seed, 4), "chosen": f" {sentence(seed + 50, 4)}", "rejected": f" {sentence(seed + 99, 4)}"}
        for seed in range(16)
    ]
)


def trainer(kind: Any, folder: Path, **options: Any) -> Any:
    is_sft = issubclass(kind, SFTTrainer)
    arguments = (SFTConfig if is_sft else DPOConfig)(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, per_device_train_batch_size=2,
        learning_rate=1e-2, **{"max_steps": 4, "save_strategy": "no", **options},
    )  # fmt: skip
    own: dict[str, Any] = {"superpipe": {"k": 2}} if issubclass(kind, SuperpipeTrainerMixin) else {}
    own |= {} if is_sft else {"ref_model": model(seed=1)}
    data = TEXTS if is_sft else PAIRS
    return kind(model=model(), args=arguments, train_dataset=data, processing_class=tokenizer(), **own)


def history(ran: Any) -> list[dict[str, float]]:
    """All that was logged, but for times."""
    timed = ("_runtime", "_per_second")
    return [{name: entry[name] for name in entry if not name.endswith(timed)} for entry in ran.state.log_history]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("ordinary", "streamed"), [(SFTTrainer, StreamedSFT), (DPOTrainer, StreamedDPO)])
def test_weights_and_logs_are_those_of_the_ordinary_run(
    ordinary: Any, streamed: Any, variant: str, tmp_path: Path
) -> None:
    runs = []
    for kind in (ordinary, streamed):
        runs.append(trainer(kind, tmp_path / kind.__name__, **VARIANTS[variant]))
        runs[-1].train()
    assert len(history(runs[0])) == 5 and history(runs[0]) == history(runs[1])
    assert all(map(torch.equal, runs[0].model.parameters(), runs[1].model.parameters()))
    assert runs[1].superpipe_report().num_steps >= 4


def test_a_reference_model_streams_through_a_window_of_its_own(tmp_path: Path) -> None:
    """Also after the Trainer has freed what it prepared; the report is that of the trained model."""
    run = trainer(StreamedDPO, tmp_path)
    run.train()
    reference, trained = run.accelerator.report_of(run.ref_model), run.superpipe_report()
    assert reference.num_steps == 0 and reference.num_loads >= 4 * (reference.num_units - 2)
    assert trained.num_steps == 4 and trained.num_loads > reference.num_loads


def test_resumed_preference_training_leaves_the_ordinary_numbers(tmp_path: Path) -> None:
    whole = trainer(DPOTrainer, tmp_path / "whole")
    whole.train()
    trainer(DPOTrainer, tmp_path / "parts", save_strategy="steps", save_steps=2).train()
    resumed = trainer(StreamedDPO, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
