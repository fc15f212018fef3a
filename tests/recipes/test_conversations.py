"""What is learned, what is masked, and that packed examples do not see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.errors import ConfigError, UnsupportedError
from lightning_superpipe.recipes.conversations import MASKED, Example, encode, encode_prompt
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.packing import join_packed, join_padded, join_prompts, pack
from lightning_superpipe.recipes.tokens import END, byte_tokenizer, load_tokenizer
from tests.recipes.runs import TINY_GPT2, TINY_LLAMA

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
    {"role": "user", "content": "Thanks."},
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != MASKED]))


def test_only_answers_are_learned_in_a_chat_and_what_ends_them() -> None:
    tokenizer = byte_tokenizer()
    example = encode({"messages": TALK}, "chat", tokenizer, "record 1")
    assert tokenizer.decode(example.input_ids) == (
        f"system:\nBe brief.\nuser:\n2 + 2?\nassistant:\n4{END}\nuser:\nAnd 3 + 3?\nassistant:\n6{END}"
    )
    assert learned(example, tokenizer) == f"4{END}6{END}"
    assert torch.equal(example.labels[example.labels != MASKED], example.input_ids[example.labels != MASKED])


def test_the_tokenizers_own_chat_template_is_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    example = encode({"messages": TALK}, "chat", tokenizer, "record 1")
    assert learned(example, tokenizer) == "4<|stop|>6<|stop|>"
    assert tokenizer.decode(encode_prompt({"messages": TALK}, "chat", tokenizer, "record 1")).endswith("<|assistant|>")


def test_a_template_that_does_not_only_append_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ConfigError, match=r"record 7.*changes what it wrote before"):
        encode({"messages": TALK}, "chat", tokenizer, "record 7")


def test_only_the_completion_is_learned_with_the_end() -> None:
    tokenizer = byte_tokenizer()
    example = encode({"prompt": "2 + 2 = ", "completion": "4é"}, "completion", tokenizer, "record 1")
    assert tokenizer.decode(example.input_ids) == f"2 + 2 = 4é{END}"
    assert learned(example, tokenizer) == f"4é{END}"


def test_a_prompt_has_the_tokens_that_it_has_in_training() -> None:
    tokenizer = byte_tokenizer()
    for kind, record in (("chat", {"messages": TALK}), ("completion", {"prompt": "ab", "completion": "c"})):
        example, prompt = encode(record, kind, tokenizer, ""), encode_prompt(record, kind, tokenizer, "")
        assert torch.equal(example.input_ids[: len(prompt)], prompt)
        assert (example.labels[len(prompt) :] != MASKED).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_packing_puts_every_example_into_one_row_within_the_capacity(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 20
    assert sum(sum(lengths[index] for index in row) <= 10 for row in rows) <= 1  # two half-empty rows would be one


def examples(*texts: str) -> list[Example]:
    tokenizer = byte_tokenizer()
    return [encode({"prompt": text[:2], "completion": text[2:]}, "completion", tokenizer, "") for text in texts]


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_GPT2], ids=["llama", "gpt2"])
def test_packed_examples_get_the_logits_that_they_get_alone(config: dict[str, Any]) -> None:
    module = FineTuning(config=config).eval()
    short, long, other = examples("abc", "defghij", "klmno")
    batch = join_packed([[short, long], [other]], pad=0)
    packed = module.net(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    places = ((packed[0, : len(short.input_ids)], short), (packed[0, len(short.input_ids) :], long))
    for logits, example in (*places, (packed[1, : len(other.input_ids)], other)):
        alone = module.net(input_ids=example.input_ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[: len(alone)], alone, rtol=1e-5, atol=1e-6)


def test_packed_and_padded_rows_have_the_same_loss() -> None:
    module = FineTuning(config=TINY_LLAMA).eval()
    rows = examples("abc", "defghij", "klmno")
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    padded = module.training_step(join_padded([[row] for row in rows], pad=0), 0)
    packed = module.training_step(join_packed([rows], pad=0), 0)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def test_an_architecture_that_cannot_tell_packed_examples_apart_is_refused(tmp_path: Path) -> None:
    from lightning_superpipe.recipes.instructions import Instructions
    from tests.recipes.runs import make_trainer
    from tests.recipes.test_records import RECORDS, jsonl

    recurrent = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    data = Instructions(jsonl(tmp_path / "a.jsonl", RECORDS), packing=True, cache_dir=str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"packed examples would see each other.*packing=false"):
        make_trainer().fit(FineTuning(config=recurrent), datamodule=data)


def test_prompts_are_padded_on_the_left() -> None:
    batch = join_prompts([torch.tensor([1, 2, 3]), torch.tensor([4])], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_tokenizer_of_bytes_survives_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    text = "def naïve():\n\treturn '→'"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode())) == text
    assert (loaded.eos_token_id, len(loaded)) == (0, 256)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"no tokenizer can be read there. It has notes.txt"):
        load_tokenizer(str(tmp_path))
