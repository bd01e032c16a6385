"""What reading a data set promises: every format and layout alike, nothing lost."""

from __future__ import annotations

import csv
import datetime
import decimal
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import read_examples
from concept_audit.errors import DataError
from concept_audit.types import Message
from tests.backend.data.common import CHAT, REPLY, USER, WRITERS, fault, jsonl, only, saved_splits, turns


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path, name):
    WRITERS[name](tmp_path / name)
    examples = list(read_examples(tmp_path / name))
    assert [e.messages for e in examples] == [turns(row) for row in CHAT]
    assert [e.metadata for e in examples] == [{"topic": "greeting"}, {"topic": "x"}]
    assert {e.source for e in examples} == {name}


def test_parquet_holds_turns_as_json_strings_too(tmp_path):
    table = pa.Table.from_pylist([{"messages": json.dumps(row["messages"])} for row in CHAT])
    pq.write_table(table, tmp_path / "a.parquet")
    examples = read_examples(tmp_path / "a.parquet")
    assert [e.messages for e in examples] == [turns(row) for row in CHAT]


def test_rows_are_numbered_as_an_editor_shows_them(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "", CHAT[0], "  ", CHAT[1])
    assert [e.source_row for e in read_examples(path)] == [2, 4]
    table = tmp_path / "a.csv"
    table.write_text('prompt,response\n"two\nlines",a\n\nb,c\n')
    assert [e.source_row for e in read_examples(table)] == [2, 5]
    pq.write_table(pa.Table.from_pylist(CHAT), tmp_path / "a.parquet")
    assert [e.source_row for e in read_examples(tmp_path / "a.parquet")] == [1, 2]


def test_a_split_is_chosen_by_name(tmp_path):
    saved_splits(tmp_path / "d")
    assert len(list(read_examples(tmp_path / "d", split="test"))) == 1
    with pytest.raises(DataError, match='no split "dev"; use one of "test", "train"'):
        read_examples(tmp_path / "d", split="dev")


def test_duplicates_are_kept(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", CHAT[0], CHAT[0])
    first, second = read_examples(path)
    assert first.content_hash == second.content_hash


def test_a_field_longer_than_csv_allows_is_read_and_the_limit_restored(tmp_path):
    limit = csv.field_size_limit()
    text = "word " * limit
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response\nq,{text}\n")
    [example] = read_examples(path)
    assert example.response == text
    assert csv.field_size_limit() == limit


def test_a_row_longer_than_a_parquet_batch_of_rows_keeps_its_number(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(1, 1001)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for example in read_examples(tmp_path / "a.parquet"):
        assert example.response == f"row {example.source_row}"


# Conversations


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Messages": [USER, REPLY]}, turns(CHAT[0])),
        ({"conversation": [USER, REPLY], "text": "no"}, turns(CHAT[0])),
        ({"messages": json.dumps([USER, REPLY])}, turns(CHAT[0])),
        ({"messages": [USER, REPLY], "prompt": "no", "response": "no"}, turns(CHAT[0])),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            (Message("system", "s"), Message("user", "q"), Message("assistant", "a")),
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s", "name": "x"},
                    {"role": "Human", "content": "q"},
                    {"role": "tool", "content": ""},
                    {"role": "model", "content": "a", "weight": 1},
                ]
            },
            (Message("system", "s"), Message("user", "q"), Message("tool", ""), Message("assistant", "a")),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": t} for t in "bc"]},
                ]
            },
            (Message("user", "a"), Message("assistant", "bc")),
        ),
        ({"Prompt": "q", "COMPLETION": "a"}, (Message("user", "q"), Message("assistant", "a"))),
        ({"prompt": "", "response": "a"}, (Message("user", ""), Message("assistant", "a"))),
        ({"input": "q", "output": "a"}, (Message("user", "q"), Message("assistant", "a"))),
        ({"instruction": "q", "input": "c", "output": "a"}, (Message("user", "q\n\nc"), Message("assistant", "a"))),
        ({"instruction": "q", "input": "", "output": "a"}, (Message("user", "q"), Message("assistant", "a"))),
        ({"text": " all of it "}, (Message("assistant", " all of it "),)),
        ({"prompt": "q", "content": "c"}, (Message("assistant", "c"),)),
    ],
)
def test_conversations_are_found_by_name(tmp_path, row, expected):
    assert only(tmp_path, row).messages == expected


def test_alpaca_rows_may_gain_an_input_later(tmp_path):
    short = {"instruction": "q", "output": "a"}
    path = jsonl(tmp_path / "a.jsonl", short, short | {"input": "c"})
    assert [e.prompt for e in read_examples(path)] == ["q", "q\n\nc"]
    assert [e.metadata for e in read_examples(path)] == [{}, {}]


def test_named_columns_go_before_those_found_by_name(tmp_path):
    row = {"messages": [USER, REPLY], "q": "Q", "answer": "A", "text": "T"}
    assert only(tmp_path, row, prompt="q").messages == (Message("user", "Q"), Message("assistant", "A"))
    assert only(tmp_path, row, text="text").messages == (Message("assistant", "T"),)
    assert only(tmp_path, row, messages="messages").messages == turns(CHAT[0])


def test_a_named_response_is_never_its_own_prompt(tmp_path):
    assert "no conversation" in fault(jsonl(tmp_path / "a.jsonl", {"input": "x", "n": 1}), response="input")


def test_a_named_instruction_is_taken_without_its_input(tmp_path):
    row = {"instruction": "q", "input": "c", "output": "a"}
    example = only(tmp_path, row, prompt="instruction")
    assert (example.prompt, example.metadata) == ("q", {"input": "c"})


def test_nul_characters_are_kept(tmp_path):
    assert only(tmp_path, {"text": "a\0b"}).response == "a\0b"
    (tmp_path / "a.csv").write_text("text\na\0b\n")
    [example] = read_examples(tmp_path / "a.csv")
    assert example.response == "a\0b"


@pytest.mark.parametrize(
    ("escaped", "expected"),
    [
        (r"\ud800", "\ufffd"),
        (r"\uDC00 x", "\ufffd x"),
        (r"\ud83d\ude42", "🙂"),
        (r"\ud800\ud83d\ude42", "\ufffd🙂"),
        (r"\\ud800", r"\ud800"),
        (r"\\\ud800", "\\\ufffd"),
    ],
)
def test_lone_surrogates_become_replacement_characters(tmp_path, escaped, expected):
    line = '{"text": "%s", "%s": "%s"}' % ((escaped,) * 3)
    example = only(tmp_path, line)
    assert example.response == expected
    assert example.metadata == {expected: expected}
    example.response.encode("utf-8")


# Metadata


def test_metadata_are_every_other_column_as_json(tmp_path):
    row = {
        "text": "t",
        "bytes": b"a\xff",
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "day": datetime.date(2024, 1, 2),
        "clock": datetime.time(3, 4),
        "took": datetime.timedelta(seconds=90),
        "price": decimal.Decimal("1.50"),
        "nan": float("nan"),
        "infinite": [float("inf"), 1.5],
        "nested": {"n": [1, None], "yes": True},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    [example] = read_examples(tmp_path / "a.parquet")
    assert json.loads(json.dumps(example.metadata, allow_nan=False)) == {
        "bytes": "a\\xff",
        "when": "2024-01-02T03:04:05",
        "day": "2024-01-02",
        "clock": "03:04:00",
        "took": 90.0,
        "price": 1.5,
        "nan": None,
        "infinite": [None, 1.5],
        "nested": {"n": [1, None], "yes": True},
    }


def test_numpy_metadata_become_json(monkeypatch):
    row = {"text": "t", "a": np.arange(2), "b": np.float32("nan"), "c": np.int64(3), "d": object}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    [example] = read_examples("owner/name")
    assert example.metadata == {"a": [0, 1], "b": None, "c": 3, "d": "<class 'object'>"}
