"""Units and anchors of real architectures, with tiny configurations, held in ``net`` as by a LightningModule."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_superpipe.partition import partition, unit_table

TEXT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BLOCKS = {"num_hidden_layers": 5}
IMAGE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=6, n_head=4, **IDS)
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, **BLOCKS, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def lora() -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def albert() -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return transformers.AlbertForMaskedLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **BLOCKS, max_position_embeddings=32))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, **BLOCKS))


def clip() -> nn.Module:
    text = {**TEXT, "num_hidden_layers": 3, "max_position_embeddings": 16}
    image = {**IMAGE, "num_hidden_layers": 3}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**TEXT, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        **IDS,
    )
    return transformers.WhisperForConditionalGeneration(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24], depths=[2, 2, 2], num_stages=3)
    return transformers.ConvNextForImageClassification(config)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 4), nn.Linear(32, 4))


class RecurrentLM(nn.Module):
    """Embedding, LSTM, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(97, 32), nn.LSTM(32, 32, 2), nn.Linear(32, 97)


class UNet(nn.Module):
    """Double convolutions down and up, with skips between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.double(3, 8), self.double(8, 16)])
        self.middle = self.double(16, 16)
        self.lift = nn.ModuleList([nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2)])
        self.up = nn.ModuleList([self.double(32, 8), self.double(16, 8)])
        self.out = nn.Conv2d(8, 1, 1)

    @staticmethod
    def double(inward: int, outward: int) -> nn.Module:
        first, second = nn.Conv2d(inward, outward, 3, padding=1), nn.Conv2d(outward, outward, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(outward), nn.ReLU(), second, nn.BatchNorm2d(outward), nn.ReLU())


class Case(NamedTuple):
    """A model, its units as `summary` writes them, and its anchors."""

    make: Callable[[], nn.Module]
    units: str
    shared: str = ""
    outside: str = ""


CASES = {
    "gpt2": Case(gpt2, "transformer.wpe 6*transformer.h.# transformer.ln_f", shared="transformer.wte.weight"),
    "llama": Case(llama, "model.embed_tokens 5*model.layers.# model.norm lm_head"),
    "tied llama": Case(lambda: llama(tied=True), "5*model.layers.# model.norm", shared="model.embed_tokens.weight"),
    "lora llama": Case(
        lora,
        "base_model.model.model.embed_tokens 5*base_model.model.model.layers.# base_model.model.model.norm "
        "base_model.model.lm_head",
    ),
    "t5": Case(
        t5,
        "3*encoder.block.# encoder.final_layer_norm 3*decoder.block.# decoder.final_layer_norm",
        shared="shared.weight",
    ),
    # One layer that runs four times, and so most of the model: split.
    "albert": Case(
        albert,
        "albert.embeddings albert.encoder.embedding_hidden_mapping_in "
        + " ".join(
            f"albert.encoder.albert_layer_groups.0.albert_layers.0.{part}"
            for part in (
                "full_layer_layer_norm",
                *(f"attention.{name}" for name in ("query", "key", "value", "dense", "LayerNorm")),
                "ffn",
                "ffn_output",
            )
        )
        + " predictions",
        shared="albert.embeddings.word_embeddings.weight",
    ),
    "bert": Case(bert, "bert.embeddings 5*bert.encoder.layer.# cls", shared="bert.embeddings.word_embeddings.weight"),
    "vit": Case(vit, "vit.embeddings 5*vit.layers.# vit.layernorm classifier"),
    "clip": Case(
        clip,
        "text_model.embeddings 3*text_model.encoder.layers.# text_model.final_layer_norm vision_model.embeddings "
        "vision_model.pre_layrnorm 3*vision_model.encoder.layers.# vision_model.post_layernorm visual_projection "
        "text_projection",
        outside="logit_scale",
    ),
    "mixtral": Case(mixtral, "model.embed_tokens 3*model.layers.# model.norm lm_head"),
    "whisper": Case(
        whisper,
        "2*model.encoder.conv# model.encoder.embed_positions 3*model.encoder.layers.# model.encoder.layer_norm "
        "model.decoder.embed_positions 3*model.decoder.layers.# model.decoder.layer_norm",
        shared="model.decoder.embed_tokens.weight",
    ),
    "resnet": Case(
        resnet,
        "resnet.embedder 2*resnet.encoder.stages.0.layers.# 2*resnet.encoder.stages.1.layers.# "
        "2*resnet.encoder.stages.2.layers.# classifier",
    ),
    "swin": Case(
        swin,
        "swin.embeddings 2*swin.encoder.layers.0.blocks.# swin.encoder.layers.0.downsample "
        "2*swin.encoder.layers.1.blocks.# swin.layernorm classifier",
    ),
    "convnext": Case(
        convnext,
        "convnext.embeddings 2*convnext.encoder.stages.0.layers.# "
        "convnext.encoder.stages.1.downsampling_layer 2*convnext.encoder.stages.1.layers.# "
        "convnext.encoder.stages.2.downsampling_layer 2*convnext.encoder.stages.2.layers.# "
        "convnext.layernorm classifier",
    ),
    "encoder": Case(encoder, "0 4*1.layers.# 2"),
    "lstm": Case(RecurrentLM, "embed rnn head"),
    "unet": Case(UNet, "2*down.# 4*middle.# 2*lift.# 2*up.# out"),
}


def summary(names: list[str]) -> str:
    """Return the names without ``net.``; neighbours that differ in a last number become one word, as ``6*h.#``."""
    words = []
    for pattern, group in itertools.groupby(names, lambda name: re.sub(r"\d+$", "#", name.removeprefix("net."))):
        alike = list(group)
        words.append(f"{len(alike)}*{pattern}" if len(alike) > 1 else alike[0].removeprefix("net."))
    return " ".join(words)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_units_are_the_blocks_and_almost_everything_streams(case):
    torch.manual_seed(0)
    root = nn.Module()
    root.net = case.make()
    divided = partition(root)
    assert summary([unit.name for unit in divided.units]) == case.units
    table = unit_table(root, divided)
    anchors = {row.name: row.role for row in table if row.role.startswith("anchor")}
    expected = {f"net.{name}": "anchor: shared by units" for name in case.shared.split()}
    assert anchors == expected | {f"net.{name}": "anchor: outside units" for name in case.outside.split()}
    assert table.share_streamed >= 0.9


@pytest.mark.parametrize(("name", "block"), [("gpt2", "GPT2Block"), ("t5", "T5Block"), ("vit", "ViTLayer")])
def test_naming_the_block_class_gives_what_the_rule_finds(name, block):
    root = nn.Module()
    root.net = CASES[name].make()
    assert [unit.name for unit in partition(root, block).units] == [unit.name for unit in partition(root).units]
