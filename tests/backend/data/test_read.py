"""What reading a data set promises: every format alike, every fault named, memory bounded."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backend.data.read import Columns, fingerprint, read_examples, read_labelled
from backend.errors import DataError
from backend.types import Message

USER, REPLY = {"role": "user", "content": 'Hi\n"you", é'}, {"role": "assistant", "content": "Yo 🙂"}
CHAT = [
    {"messages": [USER, REPLY], "topic": "greeting"},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY, USER], "topic": "x"},
]


def jsonl(path: Path, *rows: Any) -> Path:
    """Write rows as JSONL; a string is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def chat(*contents: str) -> dict[str, Any]:
    """A row of turns that alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def turns(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])


def only(path: Path, row: Any, **columns: str) -> Any:
    """The example that a file of this one row holds."""
    [example] = read_examples(jsonl(path / "train.jsonl", row), columns=Columns(**columns))
    return example


def fault(source: str | Path, **columns: str) -> str:
    """The message with which reading fails."""
    with pytest.raises(DataError) as caught:
        list(read_examples(source, columns=Columns(**columns)))
    return str(caught.value)


# Round trips


def write_table(path: Path, delimiter: str = ",", opener: Callable[..., Any] = open) -> None:
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["messages", "topic"])
        writer.writerows([json.dumps(row["messages"]), row["topic"]] for row in CHAT)


def write_gzip_jsonl(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, CHAT)).encode()))


def saved(path: Path) -> None:
    datasets.Dataset.from_list(CHAT).save_to_disk(path)


def saved_splits(path: Path) -> None:
    train, other = datasets.Dataset.from_list(CHAT), datasets.Dataset.from_list(CHAT[:1])
    datasets.DatasetDict(train=train, test=other).save_to_disk(path)


def saved_with_format(path: Path) -> None:
    datasets.Dataset.from_list(CHAT).with_format("numpy").save_to_disk(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: jsonl(path, *CHAT),
    "a.ndjson": lambda path: jsonl(path, *CHAT),
    "lines.json": lambda path: jsonl(path, *CHAT),
    "A.JSONL": lambda path: jsonl(path, *CHAT),
    "array.json": lambda path: path.write_text(json.dumps(CHAT, indent=2)),
    "bom.jsonl": lambda path: path.write_text(
        "\n".join(map(json.dumps, CHAT)), encoding="utf-8-sig"
    ),
    "a.csv": write_table,
    "a.tsv": lambda path: write_table(path, delimiter="\t"),
    "a.csv.gz": lambda path: write_table(path, opener=gzip.open),
    "a.jsonl.gz": write_gzip_jsonl,
    "a.json.gz": write_gzip_jsonl,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(CHAT), path),
    "saved": saved,
    "saved_splits": saved_splits,
    "saved_with_format": saved_with_format,
}


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
            (
                Message("system", "s"),
                Message("user", "q"),
                Message("tool", ""),
                Message("assistant", "a"),
            ),
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
        (
            {"instruction": "q", "input": "c", "output": "a"},
            (Message("user", "q\n\nc"), Message("assistant", "a")),
        ),
        (
            {"instruction": "q", "input": "", "output": "a"},
            (Message("user", "q"), Message("assistant", "a")),
        ),
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
    assert only(tmp_path, row, prompt="q").messages == (
        Message("user", "Q"),
        Message("assistant", "A"),
    )
    assert only(tmp_path, row, text="text").messages == (Message("assistant", "T"),)
    assert only(tmp_path, row, messages="messages").messages == turns(CHAT[0])


def test_a_named_response_is_never_its_own_prompt(tmp_path):
    assert "no conversation" in fault(
        jsonl(tmp_path / "a.jsonl", {"input": "x", "n": 1}), response="input"
    )


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


# Faults of a source, told before any row is read


def test_a_missing_file_is_never_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for source in ("train.jsonl", "./train", "/no/train", "folder/train", "a/b.csv.gz", Path("x")):
        with pytest.raises(DataError, match=f"^{source}: no such file or directory; check"):
            read_examples(source)
        with pytest.raises(DataError, match="no such file"):
            fingerprint(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n  \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "prompt,response\n"),
        ("a.tsv", "\n\n"),
        ("a.jsonl.gz", ""),
    ],
)
def test_an_empty_file_is_refused_at_once(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: no rows in it"):
        read_examples(tmp_path / name)


def test_a_parquet_file_without_rows_is_refused_at_once(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows in it"):
        read_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a", "a.parquet.gz", "a.gz"])
def test_an_unsupported_suffix_is_refused_with_those_that_are_supported(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"rename it to one of \.jsonl, .*\.parquet"):
        read_examples(tmp_path / name)


def test_a_directory_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not a data set .* name a file in it"):
        read_examples(tmp_path)


def test_a_data_set_that_lost_its_data_is_named(tmp_path):
    saved(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"x")
    assert "incomplete or corrupt data set" in fault(tmp_path / "d")


def test_columns_that_say_nothing_are_listed(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"a": 1, "b": 2})
    assert fault(path).startswith(
        'train.jsonl line 1: no conversation in the columns "a", "b"; pass --messages-column'
    )


@pytest.mark.parametrize("named", ["messages", "prompt", "response", "text"])
def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path, named):
    path = jsonl(tmp_path / "train.jsonl", {"prompt": "q", "response": "a"})
    assert (
        fault(path, **{named: "nope"})
        == 'train.jsonl line 1: no column "nope"; name one of "prompt", "response"'
    )


def test_columns_of_two_layouts_exclude_each_other(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"text": "t", "response": "a"})
    assert '"response", "text" exclude each other' in fault(path, text="text", response="response")


# Faults of a row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER]},
            '"messages" has no assistant turn; add one or pass --text-column',
        ),
        ({"messages": []}, '"messages" has no assistant turn; add one or pass --text-column'),
        (chat("q", " \n"), '"messages" has an empty assistant response; fill it or drop the row'),
        (chat("q", "a", "q", ""), '"messages" has an empty assistant response; fill it'),
        ({"messages": None}, '"messages" is null; fill it or drop the row'),
        ({"messages": 5}, '"messages" is a number, not a list of turns; pass --messages-column'),
        ({"messages": "[{'role'"}, '"messages": broken JSON at column 3 (Expecting property'),
        ({"messages": ["hi"]}, '"messages" turn 1 is a string; write {"role": ..., "content"'),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            '"messages" turn 1: unknown role "bot"; use one of "system", "user", "assistant"',
        ),
        ({"messages": [{"content": "a"}]}, '"messages" turn 1: unknown role null; use one of'),
        (
            {"messages": [{"from": "bot", "value": "a"}]},
            '"messages" turn 1: unknown from "bot"; use one of',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": {"a": 1}}]},
            '"messages" turn 2: "content" is an object; write a string or a list of text parts',
        ),
        (
            {"messages": [USER, {"role": "assistant"}]},
            '"messages" turn 2: "content" is null; write a string',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]},
            '"messages" turn 1: "content" has a part that is not text (image_url); keep parts',
        ),
    ],
)
def test_a_chat_that_cannot_be_read_is_named_with_its_line(tmp_path, row, message):
    path = jsonl(tmp_path / "train.jsonl", CHAT[0], row)
    assert fault(path).startswith(f"train.jsonl line 2: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, 'no "response", which the first row has, among "prompt"; keep to one'),
        ({"prompt": "q", "response": None}, '"response" is null; fill it or drop the row'),
        ({"prompt": "q", "response": " "}, '"response" has an empty assistant response; fill it'),
        ({"prompt": "q", "response": 5}, '"response" is a number; write a string or a list of'),
        ({"prompt": None, "response": "a"}, '"prompt" is null; fill it or drop the row'),
        (
            {"prompt": "q", "response": [USER, REPLY]},
            '"response" has a part that is not text (None); keep parts',
        ),
        (CHAT[0], 'no "prompt", which the first row has, among "messages", "topic"; keep to one'),
        ("[1]", 'a list where an object is expected; write {"messages": [...]}'),
        ('"x"', "a string where an object is expected"),
        ('{"prompt": "q" "response"}', "broken JSON at column 16 (Expecting ',' delimiter); write"),
        ("[" * 100_000, "JSON that cannot be read (maximum recursion depth exceeded"),
        ('{"prompt": %s}' % ("9" * 5000), "JSON that cannot be read (Exceeds the limit"),
    ],
)
def test_a_prompt_and_response_that_cannot_be_read_are_named_with_their_line(
    tmp_path, row, message
):
    path = jsonl(tmp_path / "train.jsonl", {"prompt": "q", "response": "a"}, "", row)
    assert fault(path).startswith(f"train.jsonl line 3: {message}")


def test_prompt_rows_in_a_file_of_chats_are_named(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", *[CHAT[0]] * 6, {"prompt": "q", "response": "a"})
    assert fault(path) == (
        'train.jsonl line 7: no "messages", which the first row has, among "prompt", "response"; '
        "keep to one format in a file, or drop the row"
    )


def test_a_prompt_without_any_response_column_is_named(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"prompt": "q", "n": 1})
    assert 'line 1: a prompt ("prompt") but no response in the columns "prompt", "n"' in fault(path)


def test_empty_plain_text_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('text\nx\n""\n')
    assert fault(tmp_path / "a.csv").startswith('a.csv line 3: "text" has an empty')


def test_metadata_nested_too_deeply_are_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", '{"text": "t", "deep": ' + "[" * 600 + "]" * 600 + "}")
    assert "a.jsonl line 1: " in fault(path)


def test_rows_before_a_fault_are_still_read(tmp_path):
    examples = read_examples(jsonl(tmp_path / "train.jsonl", CHAT[0], "{"))
    assert next(examples).messages == turns(CHAT[0])
    with pytest.raises(DataError, match="line 2: broken JSON"):
        next(examples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n {"text": "a"},\n {"text" "b"}\n]', "a.json: broken JSON at line 3 column 10 ("),
        ('[{"text": "a"}, 5]', "a.json row 2: a number where an object is expected"),
        ('{\n "text": "a"\n}', "a.json line 1: broken JSON at column 2 ("),
    ],
)
def test_faults_of_a_json_file_are_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    assert fault(tmp_path / "a.json").startswith(message)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path, name):
    line = {"a.jsonl": b'{"text": "a"}\n', "a.csv": b"text\n"}[name]
    (tmp_path / name).write_bytes(line + "é".encode("latin-1") + b"\n")
    assert fault(tmp_path / name) == (
        f"{name} line 2: not UTF-8 (byte 0xe9 at byte offset {len(line)}); "
        "convert the file to UTF-8"
    )


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "corrupt"])
def test_damaged_gzip_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress("\n".join(json.dumps(chat("q", str(i))) for i in range(999)).encode())
    broken = {"truncated": data[:-50], "not gzip": b"{}", "corrupt": data[:40] + b"\xff" * 400}
    path.write_bytes(broken[damage])
    assert fault(path).startswith("a.jsonl.gz: truncated or corrupt gzip (")


@pytest.mark.parametrize("damage", ["truncated", "not parquet", "empty", "corrupt"])
def test_damaged_parquet_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": str(i) * 9} for i in range(5000)]), path)
    data = path.read_bytes()
    corrupt = data[:10] + b"\xff" * 2000 + data[2010:]
    broken = {"truncated": data[:-50], "not parquet": b"x" * 99, "empty": b"", "corrupt": corrupt}
    path.write_bytes(broken[damage])
    assert fault(path).startswith("a.parquet: truncated or corrupt Parquet after row 0 (")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prompt,response\n"a\nb",c\nd,e,f\n', "a.csv line 4: 3 fields where the header has 2; q"),
        ("prompt,response\na\n", "a.csv line 2: 1 fields where the header has 2; quote fields"),
        ('prompt,response\na,b\nc,"open\nd,e\n', "a.csv line 3: broken CSV (unexpected end of"),
        ("text,text\na,b\n", 'a.csv line 1: several columns are named "text"; rename them'),
    ],
)
def test_faults_of_a_csv_file_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    assert fault(tmp_path / "a.csv").startswith(message)


# The hub


def test_a_hub_data_set_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return datasets.Dataset.from_list(CHAT).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = list(read_examples("owner/name", split="test"))
    assert asked == {"name": "owner/name", "split": "test", "streaming": True}
    assert [e.messages for e in examples] == [turns(row) for row in CHAT]
    assert [(e.source, e.source_row) for e in examples] == [("owner/name", 1), ("owner/name", 2)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "no file, and the hub cannot be reached; go online, or"),
        (FileNotFoundError("gone"), "neither a file nor a readable data set on the hub; check"),
        (ValueError("Bad split"), "neither a file nor a readable data set on the hub; check the"),
    ],
)
def test_a_hub_data_set_that_cannot_be_had_is_refused_at_once(monkeypatch, error, message):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for ask in (read_examples, fingerprint):
        with pytest.raises(DataError, match=rf"^owner/name: {message}.*\({error}\)"):
            ask("owner/name")


# Labelled examples


@pytest.mark.parametrize(("label", "read"), [(0, 0), (1, 1), (True, 1), (False, 0)])
def test_labels_are_numbers_or_booleans(tmp_path, label, read):
    [labelled] = read_labelled(jsonl(tmp_path / "p.jsonl", CHAT[0] | {"label": label}))
    assert (labelled.messages, labelled.label) == (turns(CHAT[0]), read)
    assert type(labelled.label) is int


@pytest.mark.parametrize(
    "extra", [{}, {"label": None}, {"label": 2}, {"label": "1"}, {"label": []}]
)
def test_a_label_that_is_none_is_named_with_its_line(tmp_path, extra):
    path = jsonl(tmp_path / "p.jsonl", CHAT[0] | {"label": 1}, CHAT[1] | extra)
    with pytest.raises(DataError, match=r'^p.jsonl line 2: "label": .*; write 0, 1, true or false'):
        read_labelled(path)


def test_labelled_examples_are_never_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_labelled("owner/name")


# Fingerprints


@pytest.mark.parametrize("name", WRITERS)
def test_a_fingerprint_tells_data_apart_and_survives_a_copy(tmp_path, name):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    WRITERS[name](tmp_path / "one" / name)
    WRITERS[name](tmp_path / "two" / name)
    if not name.endswith(".csv.gz"):  # gzip writes the time
        assert fingerprint(tmp_path / "one" / name) == fingerprint(tmp_path / "two" / name)
    other = jsonl(tmp_path / "other.jsonl", CHAT[0])
    assert fingerprint(tmp_path / "one" / name) != fingerprint(other)


def test_fingerprints_of_splits_differ_and_ignore_caches(tmp_path):
    saved_splits(tmp_path / "d")
    train, test = (fingerprint(tmp_path / "d", split) for split in ("train", "test"))
    (tmp_path / "d" / "train" / "cache-1.arrow").write_bytes(b"x")
    assert train != test
    assert fingerprint(tmp_path / "d") == train


def test_a_hub_fingerprint_follows_name_split_and_revision(monkeypatch):
    class Builder:
        hash = "a"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: Builder)
    prints = {fingerprint("o/n"), fingerprint("o/m"), fingerprint("o/n", "test")}
    Builder.hash = "b"
    prints.add(fingerprint("o/n"))
    assert len(prints) == 4


# Memory


def peak_while_reading(path: Path) -> int:
    tracemalloc.start()
    try:
        for _ in read_examples(path):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_many(path: Path, rows: int) -> None:
    data = [{"prompt": f"question {i}", "response": "answer " * 20} for i in range(rows)]
    if path.suffix == ".jsonl":
        jsonl(path, *data)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    else:
        path.write_text("prompt,response\n" + "\n".join(",".join(row.values()) for row in data))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, suffix):
    few, many = tmp_path / f"few{suffix}", tmp_path / f"many{suffix}"
    write_many(few, 5_000)
    write_many(many, 20_000)
    peak_while_reading(few)  # imports and caches
    assert peak_while_reading(many) <= 1.1 * peak_while_reading(few) + 50_000
