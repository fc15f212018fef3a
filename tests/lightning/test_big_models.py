"""Models made on the meta device, models too large for two copies, and saves that are killed."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_superpipe import FabricSuperpipeStrategy, SuperpipeStrategy, attach
from lightning_superpipe.adapters.fabric import SuperpipeCheckpointIO
from lightning_superpipe.adapters.materialize import materialize
from lightning_superpipe.errors import UnsupportedError
from tests.processes import CONTEXT

GPT2 = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
LLAMA = LlamaConfig(
    num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=64, pad_token_id=0
)
NUM_VALUES = 2_000_000  # of a checkpoint whose save takes long enough to be hit
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPConfig(
    text_config={**TINY, "vocab_size": 32}, vision_config={**TINY, "image_size": 8, "patch_size": 4}, projection_dim=8
)


def blocks() -> nn.Sequential:
    """Modules of torch that fill themselves by ``reset_parameters``, one of them twice in the model."""
    first, shared = nn.Linear(8, 8), nn.Linear(8, 8)
    return nn.Sequential(first, nn.LayerNorm(8), shared, nn.BatchNorm1d(8), shared, nn.Linear(8, 8))


class OnMeta(L.LightningModule):
    """Makes its network in ``configure_model``, with or without memory."""

    def __init__(self, *, meta: bool) -> None:
        super().__init__()
        self.net: nn.Module | None = None
        self.meta = meta
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            with torch.device("meta" if self.meta else "cpu"):
                self.net = blocks()
            torch.manual_seed(3)  # memory is given later, with the same random numbers

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.net is not None
        loss: Tensor = self.net(batch).square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module: L.LightningModule, folder: Path, strategy: Any, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, default_root_dir=folder, max_steps=4, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)
    trainer.fit(module, data)
    return trainer


def test_a_network_made_on_meta_trains_as_one_made_with_memory(tmp_path: Path) -> None:
    plain, streamed = OnMeta(meta=False), OnMeta(meta=True)
    fit(plain, tmp_path, "auto")
    fit(streamed, tmp_path, SuperpipeStrategy(k=2))
    assert len(streamed.losses) == 4 and all(map(torch.equal, plain.losses, streamed.losses))
    states = plain.state_dict(), streamed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_network_made_on_meta_takes_its_values_from_a_checkpoint(tmp_path: Path) -> None:
    first = OnMeta(meta=False)
    fit(first, tmp_path, "auto").save_checkpoint(tmp_path / "half.ckpt")
    plain, streamed = OnMeta(meta=False), OnMeta(meta=True)
    for module, strategy in ((plain, "auto"), (streamed, SuperpipeStrategy(k=2))):
        trainer = L.Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(
            module, torch.utils.data.DataLoader(torch.ones(16, 8), batch_size=4), ckpt_path=tmp_path / "half.ckpt"
        )
    assert streamed.losses and all(map(torch.equal, plain.losses, streamed.losses))


@pytest.mark.parametrize(
    ("kind", "config"),
    [(GPT2LMHeadModel, GPT2), (LlamaForCausalLM, LLAMA), (CLIPModel, CLIP)],
    ids=["gpt2", "llama", "clip"],
)
def test_a_transformers_model_on_meta_fills_itself_buffers_and_ties_included(kind: Any, config: Any) -> None:
    with torch.device("meta"):
        made = nn.Sequential(kind(config))
    materialize(made)
    usual = nn.Sequential(kind(config))
    assert not any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    assert len(list(made.parameters())) == len(list(usual.parameters()))  # ties included
    buffers = dict(usual.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in made.named_buffers())
    spread = {name: parameter.std(correction=0) for name, parameter in made.named_parameters()}
    for name, parameter in usual.named_parameters():
        assert torch.allclose(spread[name], parameter.std(correction=0), rtol=0.5, atol=1e-6), name


def test_a_module_that_cannot_fill_itself_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        root = nn.Sequential(nn.Linear(3, 3), Scale())
    with pytest.raises(UnsupportedError, match=r"'1' \(Scale\).*no reset_parameters"):
        materialize(root)
    assert root[0].weight.is_meta  # nothing was begun


def test_a_model_that_has_its_values_keeps_them() -> None:
    class Filled(nn.Linear):
        def init_weights(self) -> None:
            raise AssertionError("its values are lost")

        _init_weights = tie_weights = init_weights

    filled = Filled(8, 8)
    weight = filled.weight.detach().clone()
    with torch.device("meta"):
        root = nn.Sequential(nn.Linear(8, 8))
    root.append(filled)
    materialize(root)
    assert not root[0].weight.is_meta and torch.equal(filled.weight, weight)


def test_fabric_gives_memory_to_a_model_that_is_set_up_before_its_optimizer() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricSuperpipeStrategy(k=2))
    with torch.device("meta"):
        model = blocks()
    torch.manual_seed(0)
    model = fabric.setup_module(model)
    torch.manual_seed(0)
    assert all(map(torch.equal, model.parameters(), blocks().parameters()))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(4, 8)).sum())
    optimizer.step()


def test_attach_refuses_a_model_without_values() -> None:
    with torch.device("meta"):
        model = blocks()
    with pytest.raises(UnsupportedError, match=r"'0' \(Linear\) is on the meta device"):
        attach(model, k=1)


@pytest.mark.parametrize(
    ("kind", "config"), [(GPT2LMHeadModel, GPT2), (LlamaForCausalLM, LLAMA)], ids=["tied", "untied"]
)
def test_a_streamed_model_is_exported_in_the_middle_of_a_run(kind: Any, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = kind(config).eval(), torch.randint(64, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attach(model, optimizer, device="cpu", k=2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        streamed = model(input_ids=ids).logits
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, streamed)


def save_for_ever(path: Path, began: Any) -> None:
    """Write one checkpoint after the other under the same name."""
    for number in itertools.count():
        checkpoint = {"number": number, "weight": torch.full((NUM_VALUES,), float(number))}
        SuperpipeCheckpointIO().save_checkpoint(checkpoint, path)
        began.set()


@pytest.mark.parametrize("wait_ms", [0, 2, 5, 9, 14, 20])
def test_a_save_that_is_killed_leaves_the_checkpoint_before_it_whole(wait_ms: int, tmp_path: Path) -> None:
    path, began = tmp_path / "last.ckpt", CONTEXT.Event()
    saving = CONTEXT.Process(target=save_for_ever, args=(path, began))
    saving.start()
    assert began.wait(60)
    time.sleep(wait_ms / 1e3)
    saving.kill()
    saving.join()
    assert saving.exitcode == -signal.SIGKILL
    found = torch.load(path, weights_only=True)
    assert torch.equal(found["weight"], torch.full((NUM_VALUES,), float(found["number"])))
    assert [each.name for each in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
