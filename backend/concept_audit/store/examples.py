"""Shards of the data: the rows as they were read, and as the model reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from concept_audit.store.partition import by_shard
from concept_audit.store.shard_store import RowShards, read_about, read_columns
from concept_audit.types import CONTENT, PROMPT, SEPARATOR, Example, Message, SkippedRow

ROWS = pa.schema(
    [
        ("example_id", pa.int64()),
        ("content_hash", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("messages", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("metadata", pa.string()),
    ]
)
TOKENS = pa.schema(
    [
        ("example_id", pa.int64()),
        ("content_hash", pa.string()),
        ("truncated", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("n_response_tokens", pa.int32()),
        ("text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("starts", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("parts", pa.list_(pa.uint8())),
    ]
)
WINDOWS = pa.schema(
    [("document", pa.int64()), ("number", pa.int64()), ("of", pa.int64()), ("start", pa.int64()), ("end", pa.int64())]
)
"""Further columns of rows where documents are split; see `concept_audit.types.Window`."""
SKIPPED = "skipped"
"""What a shard of rows says of those that were left out."""
TEXT_COLUMNS = ["example_id", "content_hash", "text", "input_ids", "starts", "ends", "parts"]
TOKEN_COLUMNS = ["example_id", "content_hash", "input_ids", "parts"]


@dataclass(frozen=True)
class TokenizedExample:
    """What the model reads of one row, as kept in a shard.

    Attributes:
        input_ids: int32 [tokens].
        parts: uint8 [tokens]; see `concept_audit.model.chat`.
    """

    example_id: int
    content_hash: str
    input_ids: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class TokenizedText:
    """One row as rendered for the model: its text, and each token's place in it.

    Attributes:
        input_ids, starts, ends, parts: int64 [tokens]; see `concept_audit.model.chat.TokenizedRow`.
    """

    content_hash: str
    text: str
    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    parts: np.ndarray


def write_rows(rows: RowShards, number: int, examples: Sequence[Example], skipped: Sequence[SkippedRow] = ()) -> None:
    """Write one shard of rows as they were read.

    Args:
        skipped: rows of the data between these and those of the next shard that were left out.
    """
    first = rows.partition.span(number).start
    records = [
        {
            "example_id": first + place,
            "content_hash": example.content_hash,
            "source": example.source,
            "source_row": example.source_row,
            "messages": messages_json(example.messages),
            "prompt": example.prompt,
            "response": example.response,
            "metadata": json.dumps(dict(example.metadata), ensure_ascii=False),
            **(asdict(example.window) if example.window else {}),
        }
        for place, example in enumerate(examples)
    ]
    about = {SKIPPED: [list(astuple(row)) for row in skipped]} if skipped else None
    split = any(example.window for example in examples)
    kept = pa.schema([*ROWS, *WINDOWS]) if split else ROWS
    rows.write_table(number, [pa.Table.from_pylist(records, kept)], kept, about)


def read_skipped(rows: RowShards, number: int) -> list[SkippedRow]:
    """The rows that were left out where a shard was read."""
    return [SkippedRow(*values) for values in read_about(rows.path(number)).get(SKIPPED, ())]


def read_conversations(rows: RowShards, number: int) -> list[tuple[int, str, str, tuple[Message, ...]]]:
    """Example id, content hash, where it was read (for errors), and turns of one shard's rows."""
    table = read_columns(rows.path(number), ["example_id", "content_hash", "source", "source_row", "messages"])
    return [
        (
            row["example_id"],
            row["content_hash"],
            f"{row['source']} row {row['source_row']}",
            messages_from_json(row["messages"]),
        )
        for row in table.to_pylist()
    ]


def read_row_texts(rows: RowShards) -> Iterator[list[str]]:
    """Prompt and response of every row, in the order of the data, a shard at a time."""
    for number in rows.numbers():
        table = read_columns(rows.path(number), ["prompt", "response"])
        yield [f"{row['prompt']}\n{row['response']}" for row in table.to_pylist()]


def write_tokens(tokens: RowShards, number: int, units: Iterator[list[dict[str, Any]]]) -> None:
    """Write one shard of rows as the model reads them, with how many tokens they have.

    Args:
        units: records of `TOKENS`, some rows at a time.
    """
    about = {"tokens": 0, "content": 0}

    def tables() -> Iterator[pa.Table]:
        for records in units:
            about["tokens"] += sum(record["n_tokens"] for record in records)
            about["content"] += sum(int((record["parts"] == CONTENT).sum()) for record in records)
            yield pa.Table.from_pylist(records, TOKENS)

    tokens.write_table(number, tables(), TOKENS, about)


def read_tokens(tokens: RowShards, number: int) -> list[TokenizedExample]:
    """The tokens of one shard's rows."""
    return _tokenized(read_columns(tokens.path(number), TOKEN_COLUMNS))


def read_examples(tokens: RowShards, example_ids: Sequence[int]) -> list[TokenizedExample]:
    """The tokens of chosen rows, in the order in which they are named."""
    found: dict[int, TokenizedExample] = {}
    for number, wanted in by_shard(example_ids).items():
        table = read_columns(tokens.complete(number), TOKEN_COLUMNS, [("example_id", "in", wanted)])
        found |= {row.example_id: row for row in _tokenized(table)}
    return [found[example_id] for example_id in example_ids]


def token_counts(tokens: RowShards) -> dict[int, tuple[int, int]]:
    """Shard → tokens of all its rows, and those of response text, which an SAE reads."""
    abouts = {number: read_about(tokens.path(number)) for number in tokens.numbers()}
    return {number: (about["tokens"], about["content"]) for number, about in abouts.items()}


def read_texts(tokens: RowShards, example_ids: Sequence[int]) -> dict[int, TokenizedText]:
    """The tokens of chosen rows with their places in the rendered text, by example id."""
    found: dict[int, TokenizedText] = {}
    for number, wanted in by_shard(example_ids).items():
        table = read_columns(tokens.complete(number), TEXT_COLUMNS, [("example_id", "in", wanted)])
        for row in table.to_pylist():
            found[row["example_id"]] = TokenizedText(
                row["content_hash"],
                row["text"],
                *(np.asarray(row[name], np.int64) for name in ("input_ids", "starts", "ends", "parts")),
            )
    return found


def has_loss(row: TokenizedExample) -> bool:
    """Whether a row has a response token to predict; of a pair each side."""
    response = row.parts != PROMPT
    edges = [-1, *np.flatnonzero(row.input_ids == SEPARATOR).tolist(), len(response)]
    return all(bool(response[before + 2 : end].any()) for before, end in zip(edges, edges[1:], strict=False))


def messages_json(messages: Sequence[Message]) -> str:
    """Turns as JSON text, in the order of their keys; see `Message.more` for what some have besides."""
    return json.dumps([{"role": m.role, "content": m.content} | m.more for m in messages], ensure_ascii=False)


def messages_from_json(text: str) -> tuple[Message, ...]:
    """The inverse of `messages_json`."""
    return tuple(_message(turn) for turn in json.loads(text))


def _message(turn: dict[str, Any]) -> Message:
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if "tool_calls" in turn else ""
    reasoning, name, call_id = (turn.get(name, "") for name in ("reasoning_content", "name", "tool_call_id"))
    return Message(turn["role"], turn["content"], calls, reasoning, name, call_id, turn.get("train", True))


def _tokenized(table: pa.Table) -> list[TokenizedExample]:
    ids, hashes = table["example_id"].to_pylist(), table["content_hash"].to_pylist()
    return [
        TokenizedExample(ids[i], hashes[i], input_ids.values.to_numpy(), parts.values.to_numpy())
        for i, (input_ids, parts) in enumerate(zip(table["input_ids"], table["parts"], strict=True))
    ]
