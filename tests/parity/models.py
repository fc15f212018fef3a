"""Real architectures in tiny configurations, each with a maker of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from tests.parity.networks import INPUT_WIDTH, Router, UNet
from tests.parity.probe import ParityCase, ParityModule

__all__ = ["MODELS", "NUM_BATCHES", "ModelModule", "ModelSpec", "model_case"]

Batch = dict[str, Any]

VOCABULARY = 97
WIDTH = 32
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(generator: Generator, length: int = 9) -> Tensor:
    """Return ids of shape (2, length) that contain no special token."""
    return torch.randint(3, VOCABULARY, (2, length), generator=generator)


def text(generator: Generator) -> Batch:
    """Return a batch for a language model."""
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def images(size: int) -> Callable[[Generator], Batch]:
    """Return a maker of classified images, (2, 3, size, size)."""

    def make(generator: Generator) -> Batch:
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator), "labels": torch.tensor([0, 1])}

    return make


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=4, n_head=4, attn_implementation="eager",
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(*, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES, num_hidden_layers=4, num_key_value_heads=2, attention_dropout=0.1, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config)


def llama_tied() -> nn.Module:
    return llama(tied=True)


def llama_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    return cast(nn.Module, get_peft_model(cast(Any, llama()), lora))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def t5_batch(generator: Generator) -> Batch:
    return {"input_ids": tokens(generator), "labels": tokens(generator, 6)}


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        **SIZES, embedding_size=16, num_hidden_layers=4, max_position_embeddings=32,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return AlbertForMaskedLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**SIZES, num_hidden_layers=4, max_position_embeddings=32, attn_implementation="eager")
    return BertForMaskedLM(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4, attention_dropout=0.1
    )
    return MixtralForCausalLM(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16,
        patch_size=4, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    reads = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "attention_dropout": 0.1, "eos_token_id": 2}
    sees = {"image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=tower | reads, vision_config=tower | sees, projection_dim=16))


def clip_batch(generator: Generator) -> Batch:
    return {"input_ids": tokens(generator), "pixel_values": images(16)(generator)["pixel_values"], "return_loss": True}


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=2, decoder_layers=2, dropout=0.1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def speech(generator: Generator) -> Batch:
    """Return mel features of shape (2, 8, 20) and their text."""
    return {"input_features": torch.randn(2, 8, 20, generator=generator), "labels": tokens(generator, 6)}


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(config)


def vectors(generator: Generator) -> Batch:
    return {"x": torch.randn(2, INPUT_WIDTH, generator=generator)}


@dataclass(frozen=True)
class ModelSpec:
    """How one architecture is built and fed.

    Attributes:
        build: returns the model; its output has a ``loss``.
        batch: returns keyword arguments of the model.
        generates: whether validation also generates text.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[Generator], Batch] = text
    generates: bool = False


MODELS: dict[str, ModelSpec] = {
    "gpt2": ModelSpec(gpt2, generates=True),
    "llama": ModelSpec(llama, generates=True),
    "llama_tied": ModelSpec(llama_tied, generates=True),
    "llama_lora": ModelSpec(llama_lora),
    "t5": ModelSpec(t5, t5_batch, generates=True),
    "albert": ModelSpec(albert),
    "bert": ModelSpec(bert),
    "mixtral": ModelSpec(mixtral),
    "vit": ModelSpec(vit, images(16)),
    "clip": ModelSpec(clip, clip_batch),
    "whisper": ModelSpec(whisper, speech),
    "resnet": ModelSpec(resnet, images(32)),
    "unet": ModelSpec(UNet, images(16)),
    "router": ModelSpec(Router, vectors),
}


class ModelModule(ParityModule):
    """Trains one architecture; validation may generate, prediction returns the loss without gradients."""

    def __init__(self, spec: ModelSpec, optimizer_options: Mapping[str, Any], *, generate: bool) -> None:
        super().__init__()
        self.spec, self.optimizer_options, self.generate = spec, optimizer_options, generate
        self.net = spec.build()
        self.net.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = cast(Tensor, self.net(**batch).loss)
        self.record_loss(loss)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.record("validation", self.net(**batch).loss)
        if self.generate:
            for name, options in GENERATIONS.items():
                self.record(name, cast(Any, self.net).generate(input_ids=batch["input_ids"][:, :4], **options))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = cast(Tensor, self.net(**batch).loss)
        self.record("prediction", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, **self.optimizer_options)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.batches(NUM_BATCHES)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.batches(1)

    predict_dataloader = val_dataloader

    def batches(self, num_batches: int) -> DataLoader[Batch]:
        generator = torch.Generator().manual_seed(1)
        batches = [self.spec.batch(generator) for _ in range(num_batches)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


GENERATIONS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"max_new_tokens": 4, "do_sample": False},
    "beams": {"max_new_tokens": 4, "num_beams": 2, "do_sample": False},
    "sampled": {"max_new_tokens": 4, "do_sample": True},
}
NUM_BATCHES = 6  # three updates of two micro-batches: the first step is traced, the second planned, the third settled
TRAINER: Mapping[str, Any] = {"max_epochs": 1, "gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
# Text is generated before the first training step, and in the epoch's own validation.
GENERATING: Mapping[str, Any] = {"limit_train_batches": 4, "num_sanity_val_steps": 0}


def model_case(name: str, *, fused: bool = False, generate: bool = False) -> ParityCase:
    """Return the case of one architecture: fit with clipping and micro-batches, validate, predict or generate."""
    spec = MODELS[name]
    options = {"fused": True} if fused else {"foreach": False}
    return ParityCase(
        name=name + ("_fused" if fused else "") + ("_generate" if generate else ""),
        hazard="A real architecture with dropout.",
        module=lambda: ModelModule(spec, options, generate=generate),
        options={**TRAINER, **(GENERATING if generate else {})},
        stages=("validate", "fit") if generate else ("fit", "validate", "predict"),
    )
