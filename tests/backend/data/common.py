"""Files that the tests of reading share."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import Columns, read_examples
from concept_audit.errors import DataError
from concept_audit.types import Message

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
    "bom.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, CHAT)), encoding="utf-8-sig"),
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
