"""Architectures beyond those of `models.py`, each for what it does to parameters; in a plain loop, without Lightning.

They run on the emulated device, where every host tensor that should have been a device copy raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_superpipe import Adversary, SuperpipeConfig
from lightning_superpipe.session import Session

pytestmark = pytest.mark.emu

Batch = dict[str, Tensor]
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
}
_DECODER = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


class Architecture(NamedTuple):
    """How to build a model and what it eats."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]


def _tokens(generator: torch.Generator) -> Batch:
    ids = torch.randint(6, 97, (2, 9), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _images(size: int) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator), "labels": torch.tensor([0, 1])}

    return batch


def _sound(generator: torch.Generator) -> Batch:
    labels = torch.randint(1, 30, (2, 4), generator=generator)
    return {"input_values": torch.randn(2, 400, generator=generator), "labels": labels}


def _captioned(generator: torch.Generator) -> Batch:
    text = torch.randint(6, 97, (2, 6), generator=generator)
    ids = torch.cat([torch.full((2, 4), 5), text], dim=1)  # 5 stands for a patch of the image
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def _causal(config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options))


def _masked(config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForMaskedLM.from_config(getattr(transformers, config)(**options))


def _llava() -> nn.Module:
    text = {"model_type": "llama", **_TEXT, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **_VISION, "patch_size": 8, "projection_dim": 16}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=5, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def _wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    return transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(**{**_TEXT, "vocab_size": 32}, **convolutions, **positions)
    )


def _bart() -> nn.Module:
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=97, **_DECODER, **widths))


_DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_FUNNEL = {"d_model": 32, "d_inner": 48, "n_head": 4, "d_head": 8, "block_sizes": [1, 1, 1], "num_decoder_layers": 1}
ARCHITECTURES: dict[str, Architecture] = {
    "gemma3: norms with an offset, sliding windows": Architecture(
        _causal("Gemma3TextConfig", **_TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4), _tokens
    ),
    "qwen2-moe: experts that a batch may leave out": Architecture(
        _causal("Qwen2MoeConfig", **_TEXT, num_key_value_heads=2, shared_expert_intermediate_size=16, **_EXPERTS),
        _tokens,
    ),
    "mamba: parameters used in place of modules": Architecture(
        _causal("MambaConfig", vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4), _tokens
    ),
    "deberta: an embedding's weight handed to every layer": Architecture(
        _masked("DebertaV2Config", **_TEXT, **_DEBERTA, max_position_embeddings=32), _tokens
    ),
    "funnel: relative positions, pooled lengths": Architecture(
        _masked("FunnelConfig", vocab_size=97, **_FUNNEL), _tokens
    ),
    "bart: encoder and decoder with a tied embedding": Architecture(_bart, _tokens),
    "convnext: scales beside convolutions": Architecture(
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
        ),
        _images(32),
    ),
    "mobilenet: many small units with BatchNorm": Architecture(
        lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.35)),
        _images(32),
    ),
    "wav2vec2: a parametrised convolution": Architecture(_wav2vec2, _sound),
    "llava: two towers and a projector": Architecture(_llava, _captioned),
}


def _train(architecture: Architecture, device: torch.device, config: SuperpipeConfig | None) -> list[Tensor]:
    """Run three clipped steps and an evaluation; return losses and weights on the host."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    model: Any = architecture.build().train()
    session = None if config is None else Session(model, config, device, trains=True, owns_root=True)
    if session is None:
        model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses = []
    for step in range(4):
        batch = {name: value.to(device) for name, value in architecture.batch(generator).items()}
        mode = "train" if step < 3 else "evaluate"
        model.train(mode == "train")
        if session is None:
            loss = model(**batch).loss
        else:
            with session.step(mode):
                loss = model(**batch).loss
        if mode == "train":
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    if session is not None:
        session.close()
    return [*losses, *(value.detach().cpu() for value in model.state_dict().values())]


@pytest.mark.filterwarnings("ignore::lightning_superpipe.errors.SuperpipeWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_equals_the_ordinary_run(emu: torch.device, name: str) -> None:
    reference = _train(ARCHITECTURES[name], emu, None)
    candidate = _train(ARCHITECTURES[name], emu, SuperpipeConfig(k=2, adversary=Adversary(seed=3)))
    unequal = [
        i for i, (one, other) in enumerate(zip(reference, candidate, strict=True)) if not torch.equal(one, other)
    ]
    assert not unequal, f"{len(unequal)} of {len(reference)} tensors differ, the first is number {unequal[0]}"
