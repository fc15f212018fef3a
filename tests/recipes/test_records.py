"""Good data is read in every format; bad data ends in one clear paragraph before anything trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.fine_tuning import FineTuning
from lightning_superpipe.recipes.instructions import Instructions
from lightning_superpipe.recipes.records import read_records
from tests.recipes.runs import TINY_LLAMA, make_trainer

RECORDS = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(8)]


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def parquet(path: Path, records: list[Any]) -> str:
    datasets.Dataset.from_list(records).to_parquet(str(path))
    return str(path)


def saved(path: Path, records: list[Any]) -> str:
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return str(path)


def saved_splits(path: Path, records: list[Any]) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", jsonl), ("a.parquet", parquet), ("folder", saved), ("splits", saved_splits)],
)
def test_every_format_gives_the_same_records(
    name: str, write: Callable[[Path, list[Any]], str], tmp_path: Path
) -> None:
    source = write(tmp_path / name, RECORDS)
    assert list(read_records(source, cache_dir=str(tmp_path / "cache"))) == RECORDS


def message_of(act: Callable[[], Any]) -> str:
    """The message of the error, which is one paragraph."""
    with pytest.raises(ConfigError) as caught:
        act()
    message = str(caught.value)
    assert "\n\n" not in message
    return message


def test_a_corrupt_line_is_named_by_its_number(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    lines[4] = lines[4][:-5]
    path = tmp_path / "corrupt.jsonl"
    path.write_text("\n".join(lines))
    message = message_of(lambda: read_records(str(path), cache_dir=str(tmp_path)))
    assert f"'{path}', line 5 is not JSON" in message
    path.write_text("\n".join(lines[:4]) + "\n[1, 2]\n")
    assert "line 5 is a list, not an object" in message_of(lambda: read_records(str(path), cache_dir=str(tmp_path)))
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff", "completion": "b"}\n')
    assert "line 2 is not JSON" in message_of(lambda: read_records(str(path), cache_dir=str(tmp_path)))


def test_a_source_that_is_missing_empty_or_something_else_is_said_to_be(tmp_path: Path) -> None:
    def message(name: str) -> str:
        return message_of(lambda: read_records(str(tmp_path / name), cache_dir=str(tmp_path / "cache")))

    assert "missing.jsonl' does not exist" in message("missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in message("empty.jsonl")
    (tmp_path / "table.parquet").write_text("no table")
    assert "cannot be read as parquet" in message("table.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    assert "is not a saved data set (it holds notes.txt)" in message("folder")
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).save_to_disk(str(tmp_path / "none"))
    assert "holds no records" in message("none")
    saved_splits(tmp_path / "splits", RECORDS)
    assert "has no split 'test'; it has train" in message_of(
        lambda: read_records(str(tmp_path / "splits"), split="test")
    )
    assert "neither a file" in message_of(lambda: read_records("somebody/something", cache_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "a", "answer": "b"}, "has the fields 'question', 'answer'; a chat has 'messages'"),
        ({"prompt": "a", "completion": None}, "record 1: 'completion' is None, but a text is needed"),
        ({"prompt": 3, "completion": "a"}, "record 1: 'prompt' is 3"),
        ({"messages": []}, "record 1: 'messages' is []"),
        ({"messages": "hello"}, "record 1: 'messages' is 'hello'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role 'assistant' (there are 'user')"),
        ({"messages": [{"role": "assistant"}]}, "message 1 is {'role': 'assistant'}; it needs 'content'"),
    ],
)
def test_a_record_without_what_is_needed_is_named_before_training(
    record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "bad.jsonl", [record, record])
    module = FineTuning(config=TINY_LLAMA)
    data = Instructions(source, held_out=source, cache_dir=str(tmp_path / "cache"))
    trainer = make_trainer()
    assert words in message_of(lambda: trainer.fit(module, datamodule=data))
    assert trainer.global_step == 0


def test_data_that_leaves_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", RECORDS)
    long = Instructions(source, max_length=5, cache_dir=str(tmp_path / "cache"))
    assert "has anything to learn within max_length=5" in message_of(lambda: long.setup("fit"))
    one = Instructions(jsonl(tmp_path / "one.jsonl", RECORDS[:1]), cache_dir=str(tmp_path / "cache"))
    assert "leaves none to train on" in message_of(lambda: one.setup("fit"))


def test_reading_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", RECORDS)
    home = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(home.rglob("*")) if home.exists() else []
    read_records(source, cache_dir=str(tmp_path / "cache"))
    assert (sorted(home.rglob("*")) if home.exists() else []) == before
