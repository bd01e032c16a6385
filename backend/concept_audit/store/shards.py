"""Shards: the rows, activations and SAE features of `ROWS_PER_SHARD` rows in a file each.

Each shard is complete or absent. Rows of a shard are in the order of their ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from concept_audit.store.layout import ROWS_PER_SHARD, Layout, whole
from concept_audit.types import Example, Message

EXAMPLES = pa.schema(
    [
        ("example_id", pa.int64()),
        ("content_hash", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("messages", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("metadata", pa.string()),
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
FEATURES = pa.schema(
    [
        ("example_id", pa.int64()),
        ("token_position", pa.int32()),
        ("token_id", pa.int32()),
        ("feature_id", pa.int32()),
        ("activation", pa.float32()),
    ]
)
ANSWERS = pa.schema([("example_id", pa.int64()), ("answer", pa.string()), ("n_tokens", pa.int32())])
TEXT_COLUMNS = ["example_id", "content_hash", "text", "input_ids", "starts", "ends", "parts"]
TOKENS_PER_BLOCK = 4096
FEATURE_GROUP = 8192
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


def write_examples(layout: Layout, number: int, rows: Sequence[tuple[Example, object]]) -> None:
    """Write one shard of rows, each with its `TokenizedRow`."""
    first = number * ROWS_PER_SHARD
    records = [_record(first + i, example, row) for i, (example, row) in enumerate(rows)]
    with whole(layout.shard("examples", number)) as file:
        pq.write_table(pa.Table.from_pylist(records, EXAMPLES), file, compression="zstd")


def read_tokens(layout: Layout, number: int) -> list[TokenizedExample]:
    """The tokens of one shard's rows."""
    table = pq.read_table(layout.shard("examples", number), columns=TOKEN_COLUMNS)
    ids, hashes = table["example_id"].to_pylist(), table["content_hash"].to_pylist()
    return [
        TokenizedExample(ids[i], hashes[i], input_ids.values.to_numpy(), parts.values.to_numpy())
        for i, (input_ids, parts) in enumerate(zip(table["input_ids"], table["parts"], strict=True))
    ]


def read_texts(layout: Layout, example_ids: Sequence[int]) -> dict[int, TokenizedText]:
    """The tokens of chosen rows with their places in the rendered text, by example id."""
    found: dict[int, TokenizedText] = {}
    for number in sorted({example_id // ROWS_PER_SHARD for example_id in example_ids}):
        wanted = [i for i in example_ids if i // ROWS_PER_SHARD == number]
        table = pq.read_table(
            layout.shard("examples", number), columns=TEXT_COLUMNS, filters=[("example_id", "in", wanted)]
        )
        for row in table.to_pylist():
            found[row["example_id"]] = TokenizedText(
                row["content_hash"],
                row["text"],
                *(np.asarray(row[name], np.int64) for name in ("input_ids", "starts", "ends", "parts")),
            )
    return found


def read_feature_activations(layout: Layout, feature: int, example_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Where one SAE feature fires in chosen rows: example id → (position, activation), float64 [firings, 2]."""
    found: dict[int, np.ndarray] = {}
    for number in sorted({example_id // ROWS_PER_SHARD for example_id in example_ids}):
        wanted = [i for i in example_ids if i // ROWS_PER_SHARD == number]
        table = pq.read_table(
            layout.shard("features", number),
            columns=["example_id", "token_position", "activation"],
            filters=[("feature_id", "==", feature), ("example_id", "in", wanted)],
        )
        owners = table["example_id"].to_numpy()
        pairs = np.stack([table["token_position"].to_numpy(), table["activation"].to_numpy()], axis=1)
        found |= {i: pairs[owners == i] for i in wanted}
    return found


def write_activations(layout: Layout, number: int, means: dict[int, np.ndarray]) -> None:
    """Write mean response activations: layer → float32 [rows, d_model]."""
    with whole(layout.shard("activations", number)) as path:
        save_file({f"layer_{layer}": array for layer, array in means.items()}, path)


def read_activations(layout: Layout, layer: int, numbers: Sequence[int] | None = None) -> Iterator[np.ndarray]:
    """Mean response activations at one layer, a shard at a time: float32 [rows, d_model].

    Rows without response tokens hold NaN.
    """
    for number in layout.shard_numbers("activations") if numbers is None else numbers:
        with safe_open(layout.shard("activations", number), "numpy") as file:
            yield file.get_tensor(f"layer_{layer}")


def write_answers(layout: Layout, number: int, texts: dict[int, tuple[str, int]], means: dict[int, np.ndarray]) -> None:
    """Write the model's own answers to one shard's prompts.

    Args:
        texts: example id → answer and its number of tokens; rows without a prompt are missing.
        means: layer → float32 [rows, d_model], mean response activations of the rows with these answers.
    """
    columns = {
        "example_id": list(texts),
        "answer": [text for text, _ in texts.values()],
        "n_tokens": [count for _, count in texts.values()],
    }
    with whole(layout.shard("answers", number)) as path:
        pq.write_table(pa.Table.from_pydict(columns, ANSWERS), path, compression="zstd")
    # Last: where this file is, the shard is complete.
    with whole(layout.shard("answer_activations", number)) as path:
        save_file({f"layer_{layer}": array for layer, array in means.items()}, path)


def read_answers(layout: Layout, example_ids: Sequence[int]) -> dict[int, str]:
    """The model's own answers to chosen rows' prompts, of those that have one: example id → text."""
    found: dict[int, str] = {}
    for number in sorted({example_id // ROWS_PER_SHARD for example_id in example_ids}):
        if layout.shard("answers", number).exists():
            wanted = [i for i in example_ids if i // ROWS_PER_SHARD == number]
            table = pq.read_table(layout.shard("answers", number), filters=[("example_id", "in", wanted)])
            found |= dict(zip(table["example_id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    return found


def answered_rows(layout: Layout) -> int:
    """How many rows' prompts the model has answered itself."""
    shards = [layout.shard("answers", number) for number in layout.shard_numbers("examples")]
    return sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards if shard.exists())


def read_answer_activations(layout: Layout, layer: int) -> Iterator[np.ndarray]:
    """As `read_activations`, of the rows with the model's own answers; NaN where there is no prompt."""
    for number in layout.shard_numbers("answer_activations"):
        with safe_open(layout.shard("answer_activations", number), "numpy") as file:
            yield file.get_tensor(f"layer_{layer}")


def activations_of(layout: Layout, layer: int, example_ids: Sequence[int]) -> np.ndarray:
    """Mean response activations of chosen rows: float32 [len(example_ids), d_model], in their order."""
    ids = np.asarray(example_ids, np.int64)
    shards = ids // ROWS_PER_SHARD
    rows: dict[int, np.ndarray] = {}
    for number in np.unique(shards):
        (block,) = read_activations(layout, layer, [int(number)])
        for i in np.flatnonzero(shards == number):
            rows[int(i)] = block[ids[i] % ROWS_PER_SHARD]
    return np.stack([rows[i] for i in range(len(ids))])


def write_token_activations(layout: Layout, number: int, activations: np.ndarray, owners: np.ndarray) -> None:
    """Write residual streams of single tokens for the SAE: float32 [tokens, d_model].

    Args:
        owners: int64 [tokens], the example that each token belongs to.
    """
    with whole(layout.shard("tokens", number)) as path:
        save_file({"activations": activations, "example_id": owners}, path)


def read_token_activations(layout: Layout, number: int) -> tuple[np.ndarray, np.ndarray]:
    """What `write_token_activations` wrote: activations and owners."""
    with safe_open(layout.shard("tokens", number), "numpy") as file:
        return file.get_tensor("activations"), file.get_tensor("example_id")


def token_blocks(layout: Layout) -> list[tuple[int, Callable[[], np.ndarray]]]:
    """All token activations in blocks of at most `TOKENS_PER_BLOCK`: size, and a function that reads them."""
    blocks = []
    for number in layout.shard_numbers("tokens"):
        with safe_open(layout.shard("tokens", number), "numpy") as file:
            total = file.get_slice("example_id").get_shape()[0]
        for start in range(0, total, TOKENS_PER_BLOCK):
            size = min(TOKENS_PER_BLOCK, total - start)
            blocks.append((size, partial(_read_block, layout, number, start, size)))
    return blocks


def _read_block(layout: Layout, number: int, start: int, size: int) -> np.ndarray:
    with safe_open(layout.shard("tokens", number), "numpy") as file:
        return file.get_slice("activations")[start : start + size]


def write_features(layout: Layout, number: int, columns: dict[str, np.ndarray]) -> None:
    """Write the SAE features that fire at each token; the columns are those of `FEATURES`.

    By feature, in small row groups, so that one feature's firings are read without the others'.
    """
    order = np.argsort(columns["feature_id"], kind="stable")
    table = pa.Table.from_pydict({name: values[order] for name, values in columns.items()}, FEATURES)
    with whole(layout.shard("features", number)) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=FEATURE_GROUP)


def messages_json(messages: Sequence[Message]) -> str:
    """Turns as JSON text, in the order of their keys."""
    return json.dumps([{"role": m.role, "content": m.content} for m in messages], ensure_ascii=False)


def messages_from_json(text: str) -> tuple[Message, ...]:
    """The inverse of `messages_json`."""
    return tuple(Message(turn["role"], turn["content"]) for turn in json.loads(text))


def _record(example_id: int, example: Example, row) -> dict:
    return {
        "example_id": example_id,
        "content_hash": example.content_hash,
        "source": example.source,
        "source_row": example.source_row,
        "messages": messages_json(example.messages),
        "prompt": example.prompt,
        "response": example.response,
        "metadata": json.dumps(dict(example.metadata), ensure_ascii=False),
        "truncated": row.truncated,
        "n_tokens": len(row.input_ids),
        "n_response_tokens": int(row.response.sum()),
        "text": row.text,
        "input_ids": row.input_ids,
        "starts": row.starts,
        "ends": row.ends,
        "parts": row.parts,
    }
