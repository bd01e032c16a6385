"""What reading promises of bad input: the file, the place, the reason and the way out are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import fingerprint, read_examples
from concept_audit.errors import DataError
from tests.backend.data.common import CHAT, REPLY, USER, chat, fault, jsonl, saved, turns

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
    assert fault(path).startswith('train.jsonl line 1: no conversation in the columns "a", "b"; pass --messages-column')


@pytest.mark.parametrize("named", ["messages", "prompt", "response", "text"])
def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path, named):
    path = jsonl(tmp_path / "train.jsonl", {"prompt": "q", "response": "a"})
    assert fault(path, **{named: "nope"}) == 'train.jsonl line 1: no column "nope"; name one of "prompt", "response"'


def test_columns_of_two_layouts_exclude_each_other(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"text": "t", "response": "a"})
    assert '"response", "text" exclude each other' in fault(path, text="text", response="response")


# Faults of a row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, '"messages" has no assistant turn; add one or pass --text-column'),
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
        ({"messages": [{"from": "bot", "value": "a"}]}, '"messages" turn 1: unknown from "bot"; use one of'),
        (
            {"messages": [USER, {"role": "assistant", "content": {"a": 1}}]},
            '"messages" turn 2: "content" is an object; write a string or a list of text parts',
        ),
        ({"messages": [USER, {"role": "assistant"}]}, '"messages" turn 2: "content" is null; write a string'),
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
        ({"prompt": "q", "response": [USER, REPLY]}, '"response" has a part that is not text (None); keep parts'),
        (CHAT[0], 'no "prompt", which the first row has, among "messages", "topic"; keep to one'),
        ("[1]", 'a list where an object is expected; write {"messages": [...]}'),
        ('"x"', "a string where an object is expected"),
        ('{"prompt": "q" "response"}', "broken JSON at column 16 (Expecting ',' delimiter); write"),
        ("[" * 100_000, "JSON that cannot be read (maximum recursion depth exceeded"),
        ('{"prompt": %s}' % ("9" * 5000), "JSON that cannot be read (Exceeds the limit"),
    ],
)
def test_a_prompt_and_response_that_cannot_be_read_are_named_with_their_line(tmp_path, row, message):
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
        f"{name} line 2: not UTF-8 (byte 0xe9 at byte offset {len(line)}); convert the file to UTF-8"
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
