"""What is read and written, and what is not: LoRA, inference and mapped checkpoints write nothing."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_superpipe import attach, map_safetensors, open_kept
from lightning_superpipe.errors import BudgetError, ConfigError, UnsupportedError
from lightning_superpipe.planning.disk_work import StoredUnit, disk_work
from lightning_superpipe.planning.lower import lower_window
from lightning_superpipe.planning.order import training_order
from lightning_superpipe.tiers import is_mapped
from tests.disk.loops import EVERYTHING, NUM_BLOCKS, Left, left, make, step, train

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(12).view(2, 6)


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")).eval()


def fine_tune(model: Any, options: dict[str, Any] | None) -> tuple[list[torch.Tensor], Any]:
    """Train what is trainable; return all weights and the report."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pipe = attach(model, optimizer, device="cpu", k=2, **options) if options is not None else None
    for _ in range(3):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = pipe.report() if pipe is not None else None
    if pipe is not None:
        pipe.close()
    return [p.detach().clone() for p in model.parameters()], report


# -- equal


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("store", ["disk", {"weights": "disk"}, {"states": "disk"}, {"gradients": "disk"}, EVERYTHING])
def test_every_placement_leaves_the_same_bits(store: Any, clip: float | None) -> None:
    options = {"store": store, "activations": "offload" if store is EVERYTHING else "keep"}
    assert train(options, clip=clip).equals(train(None, clip=clip))


@pytest.mark.parametrize("options", [{"wire_dtype": "bfloat16"}, {"disk": {"undo": False, "ring": 2, "requests": 1}}])
def test_other_options_leave_the_bits_that_they_leave_in_memory(options: dict[str, Any]) -> None:
    assert train({"store": "disk", **options}).equals(train(options))


def test_masters_in_files_leave_the_bits_that_they_leave_in_memory() -> None:
    found = []
    for store in ("host", "disk"):
        model, optimizer = make(dtype=torch.bfloat16)
        with attach(model, optimizer, device="cpu", k=2, store=store, master_weights="float32"):
            losses = [step(model, optimizer, number) for number in range(4)]
        found.append(left(model, optimizer, losses))
    assert found[0].equals(found[1])


def test_states_loaded_in_mid_run_are_used() -> None:
    model, optimizer = make()
    for number in range(2):
        step(model, optimizer, number)
    saved = {key: value.clone() for key, value in model.state_dict().items()}, optimizer.state_dict()
    saved = torch.load(_saved(saved))
    reference = [step(model, optimizer, number) for number in range(2, 4)]
    model, optimizer = make(seed=1)
    with attach(model, optimizer, device="cpu", k=2, store="disk"):
        step(model, optimizer, 9)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert [step(model, optimizer, number) for number in range(2, 4)] == reference


@pytest.mark.parametrize("change", ["load", "exchange"])
def test_states_that_are_set_aside_or_exchanged_stay_as_they_are(change: str) -> None:
    def run(store: str | None) -> Left:
        model, optimizer = make()
        with contextlib.nullcontext() if store is None else attach(model, optimizer, device="cpu", k=2, store=store):
            step(model, optimizer, 0)
            first = copy.deepcopy(optimizer.state_dict())
            step(model, optimizer, 1)
            aside = optimizer.state_dict()
            if change == "load":
                optimizer.load_state_dict(first)
                step(model, optimizer, 2)
                optimizer.load_state_dict(aside)  # which are those of then, as long as somebody holds them
            else:
                up, down = (optimizer.state[each.weight] for each in (model.blocks[0].norm, model.blocks[1].norm))
                one = optimizer.state[model.blocks[0].norm.bias]
                up["exp_avg"], one["exp_avg"], down["exp_avg"] = down["exp_avg"], up["exp_avg"], one["exp_avg"]
            step(model, optimizer, 3)
        return left(model, optimizer)

    assert run("disk").equals(run(None))


def _saved(what: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


# -- counted


def test_step_moves_what_the_plan_says() -> None:
    model, optimizer = make()
    unit = sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters())
    padded = -(-unit // 4096) * 4096
    with attach(model, optimizer, device="cpu", k=2, store="disk", update="at_once", disk={"endurance_tb": 1}) as pipe:
        for number in range(4):
            step(model, optimizer, number)
        report = pipe.report()
    states = -(-2 * unit // 4096) * 4096
    loads = [a.unit for a in lower_window(training_order(NUM_BLOCKS), k=2, k_prime=1).actions if a.op.value == "P"]
    work = disk_work(loads, [StoredUnit(padded, states)] * NUM_BLOCKS)
    assert report.last_step.disk_written_bytes == work.written_bytes
    assert report.last_step.disk_read_bytes == work.read_bytes
    assert report.drive_life_per_step == work.life(1)
    assert "written to disk" in str(report)


class Whole(torch.optim.SGD):
    """A class of the user's: nobody knows whether it can be split."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_weights_that_an_optimizer_writes_itself_are_counted() -> None:
    model, _ = make()
    torch.optim.SGD(model.parameters())  # torch hooks the steps of classes that were made: both fire in one step
    optimizer = Whole(model.parameters(), lr=1e-2)
    with attach(model, optimizer, device="cpu", k=2, store="disk") as pipe:
        step(model, optimizer, 0)
        before = pipe.report().total.disk_written_bytes
        step(model, optimizer, 1)
        written = pipe.report().total.disk_written_bytes - before
    assert written == sum(parameter.nbytes for block in model.blocks for parameter in block.parameters())


def test_inference_writes_nothing_after_weights_have_moved() -> None:
    model, _ = make()
    with attach(model, device="cpu", k=2, store="disk") as pipe, torch.no_grad():
        filled = pipe.report().total
        for _ in range(3):
            model(torch.ones(2, 48))
        total = pipe.report().total
    assert total.disk_read_bytes > filled.disk_read_bytes
    assert total.disk_written_bytes == filled.disk_written_bytes


def test_adapters_train_and_nothing_is_written() -> None:
    expected, _ = fine_tune(adapted(language_model()), None)
    with attach(adapted(language_model()), device="cpu", k=2, store="disk") as pipe:
        filled = pipe.report().total.disk_written_bytes
    got, report = fine_tune(adapted(language_model()), {"store": "disk"})
    assert all(map(torch.equal, expected, got))
    assert report.total.disk_written_bytes == filled  # at the start, and never again
    assert report.last_step.disk_read_bytes > 0


# -- straight from a checkpoint


@pytest.fixture(params=["one file", "shards"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    size = "10GB" if request.param == "one file" else "40KB"
    language_model().save_pretrained(tmp_path / "model", max_shard_size=size)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (request.param == "shards")
    return tmp_path / "model"


def mapped(folder: Path) -> Any:
    """The model with its parameters where they are in the files."""
    model = language_model()
    model.load_state_dict(map_safetensors(folder), assign=True)
    return model.eval()


def test_mapped_tensors_equal_those_that_are_read(checkpoint: Path) -> None:
    found = map_safetensors(checkpoint)
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            assert torch.equal(tensor, found.pop(name))
    assert not found


def test_inference_reads_a_checkpoint_where_it_is(checkpoint: Path) -> None:
    expected = language_model()(input_ids=IDS).logits
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    model = mapped(checkpoint).requires_grad_(False)
    with attach(model, device="cpu", k=2, store={"weights": "disk"}) as pipe, torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert pipe.report().total.disk_written_bytes == 0
        assert all(is_mapped(parameter) for parameter in model.parameters())
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_adapters_train_over_a_checkpoint_that_stays_as_it_is(checkpoint: Path) -> None:
    expected, _ = fine_tune(adapted(language_model()), None)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    got, report = fine_tune(adapted(mapped(checkpoint)), {"store": "disk"})
    assert all(map(torch.equal, expected, got))
    assert report.total.disk_written_bytes == 0
    assert report.host.weights < 0.5 * sum(weight.nbytes for weight in got)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = min(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        map_safetensors(checkpoint)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="truncated"):
        map_safetensors(checkpoint)
    file.write_bytes((9).to_bytes(8, "little") + b"[1, 2, 3]")
    with pytest.raises(ConfigError, match="no mapping"):
        map_safetensors(file)
    file.unlink()
    with pytest.raises(ConfigError, match=r"lacks|holds no"):
        map_safetensors(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ConfigError, match="no index"):
        map_safetensors(checkpoint)


# -- kept


def kept(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = make()
    with attach(model, optimizer, device="cpu", k=2, store="disk", disk={"folder": str(folder), "keep": True}):
        for number in range(2):
            step(model, optimizer, number)
    return model, optimizer


def test_kept_files_give_weights_and_states_back(tmp_path: Path) -> None:
    model, optimizer = kept(tmp_path)
    found = open_kept(tmp_path)
    assert {name: value.tolist() for name, value in found.weights.items()} == {
        name: value.tolist() for name, value in model.named_parameters()
    }
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(found.states[f"{name}/{key}"], value)
    with pytest.raises(UnsupportedError, match="has kept"):
        attach(model, device="cpu", k=2, store="disk", disk={"folder": str(tmp_path)})


def test_training_on_in_memory_leaves_what_was_kept_as_it_was(tmp_path: Path) -> None:
    model, optimizer = kept(tmp_path)
    before = left(model, optimizer)
    step(model, optimizer, 2)
    assert not left(model, optimizer).equals(before)
    found = open_kept(tmp_path).weights.values()
    assert all(map(torch.equal, found, before.weights))


@pytest.mark.parametrize("kind", ["weights", "states"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_kept_files_that_were_damaged_are_refused_by_name(kind: str, damage: str, tmp_path: Path) -> None:
    kept(tmp_path)
    file = tmp_path / f"{kind}.bytes"
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:4096])
    else:
        entry = json.loads((tmp_path / "manifest.json").read_text())["tensors"][kind]
        at = next(iter(entry.values()))["offset"]
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"from a checkpoint") as told:
        open_kept(tmp_path)
    assert {"gone": "cannot be opened", "truncated": "truncated", "altered": "checksum"}[damage] in str(told.value)


def test_folder_of_a_killed_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bytes").write_bytes(bytes(4096))
    with pytest.raises(UnsupportedError, match="killed keeps nothing"):
        open_kept(tmp_path)


# -- host memory


def test_host_that_is_too_small_for_memory_is_enough_for_files() -> None:
    model, optimizer = make()
    total = 16 * sum(p.numel() for p in model.parameters())
    with pytest.raises(BudgetError, match="store='disk'"):
        attach(model, optimizer, device="cpu", k=1, host_memory=int(total * 0.9))
    few = {"ring": 2}
    with attach(model, optimizer, device="cpu", k=1, store=EVERYTHING, disk=few, host_memory=int(total * 0.9)) as pipe:
        step(model, optimizer, 0)
        step(model, optimizer, 1)
        assert pipe.report().host.total <= total * 0.9
