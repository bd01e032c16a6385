"""Shards of activations: means over responses, single tokens for an SAE, features that fire, own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from concept_audit.store.partition import by_shard, first_row
from concept_audit.store.shard_store import RowShards, is_there, open_tensors, read_columns, table_rows

FIRINGS = pa.schema(
    [
        ("example_id", pa.int64()),
        ("token_position", pa.int32()),
        ("token_id", pa.int32()),
        ("feature_id", pa.int32()),
        ("activation", pa.float32()),
    ]
)
ANSWERS = pa.schema([("example_id", pa.int64()), ("answer", pa.string()), ("n_tokens", pa.int32())])
TOKENS_PER_BLOCK = 4096
FEATURE_GROUP = 8192
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def write_means(means: RowShards, number: int, layers: Mapping[int, np.ndarray]) -> None:
    """Write mean response activations: layer → float32 [rows, d_model]."""
    means.write_tensors(number, {f"layer_{layer}": torch.from_numpy(array) for layer, array in layers.items()})


def read_means(means: RowShards, layer: int) -> Iterator[np.ndarray]:
    """Mean response activations at one layer, a shard at a time: float32 [rows, d_model].

    Rows without response tokens (or without an answer, where they are of own answers) hold NaN.

    Raises:
        StoreError: a shard is missing or short, so that rows would be taken for others.
    """
    for number in means.numbers():
        yield _tensor(means.path(number), f"layer_{layer}")


def means_of(means: RowShards, layer: int, example_ids: Sequence[int]) -> np.ndarray:
    """Mean response activations of chosen rows: float32 [len(example_ids), d_model], in their order.

    Raises:
        StoreError: a shard that they are in is missing or short.
    """
    rows: dict[int, np.ndarray] = {}
    for number, wanted in by_shard(example_ids).items():
        block = _tensor(means.complete(number), f"layer_{layer}")
        rows |= {example_id: block[example_id - first_row(number)] for example_id in wanted}
    return np.stack([rows[int(example_id)] for example_id in example_ids])


def mean_of_rows(means: RowShards, layer: int) -> np.ndarray:
    """The mean of all rows that have response tokens: float64 [d_model]; zeros if none has."""
    total, count = np.zeros(1), 0
    for block in read_means(means, layer):
        present = block[~np.isnan(block).any(1)].astype(np.float64)
        total, count = total + present.sum(0), count + len(present)
    return total / max(count, 1)


def write_answers(answers: RowShards, number: int, texts: Mapping[int, tuple[str, int]]) -> None:
    """Write the model's own answers to one shard's prompts.

    Args:
        texts: example id → answer and its number of tokens; rows without a prompt are missing.
    """
    columns = {
        "example_id": list(texts),
        "answer": [text for text, _ in texts.values()],
        "n_tokens": [count for _, count in texts.values()],
    }
    answers.write_table(number, [pa.Table.from_pydict(columns, ANSWERS)], ANSWERS)


def read_answers(answers: RowShards, example_ids: Sequence[int]) -> dict[int, str]:
    """The model's own answers to chosen rows' prompts, of those that have one: example id → text."""
    return {example_id: text for example_id, (text, _) in read_counted_answers(answers, example_ids).items()}


def read_counted_answers(answers: RowShards, example_ids: Sequence[int]) -> dict[int, tuple[str, int]]:
    """As `read_answers`, with the number of tokens that each was made of: example id → text and count."""
    found: dict[int, tuple[str, int]] = {}
    for number, wanted in by_shard(example_ids).items():
        if is_there(answers.path(number)):
            table = read_columns(answers.path(number), ANSWERS.names, [("example_id", "in", wanted)])
            found |= {row["example_id"]: (row["answer"], row["n_tokens"]) for row in table.to_pylist()}
    return found


def answered_rows(answers: RowShards) -> int:
    """How many rows' prompts the model has answered itself."""
    return sum(map(table_rows, answers.there()))


def write_token_activations(shards: RowShards, number: int, activations: np.ndarray, owners: np.ndarray) -> None:
    """Write residual streams of single tokens for the SAE.

    Args:
        activations: float32 [tokens, d_model].
        owners: int64 [tokens], the example that each token belongs to.
    """
    tensors = {"activations": torch.from_numpy(activations), "example_id": torch.from_numpy(owners)}
    shards.write_tensors(number, tensors)


def read_token_activations(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `write_token_activations` wrote: activations and owners."""
    return _tensor(path, "activations"), _tensor(path, "example_id")


def token_blocks(shards: RowShards) -> list[tuple[int, Callable[[], np.ndarray]]]:
    """All token activations in blocks of at most `TOKENS_PER_BLOCK`: size, and a function that reads them."""
    blocks: list[tuple[int, Callable[[], np.ndarray]]] = []
    for number in shards.numbers():
        with open_tensors(shards.path(number), "numpy") as file:
            total = file.get_slice("example_id").get_shape()[0]
        for start in range(0, total, TOKENS_PER_BLOCK):
            size = min(TOKENS_PER_BLOCK, total - start)
            blocks.append((size, partial(_read_block, shards.path(number), start, size)))
    return blocks


def write_firings(features: RowShards, number: int, units: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write the SAE features that fire at each token.

    By feature, in small row groups, so that one feature's firings are read without the others'.

    Args:
        units: columns of `FIRINGS`, some rows at a time.
    """

    def tables() -> Iterator[pa.Table]:
        for columns in units:
            order = np.argsort(columns["feature_id"], kind="stable")
            yield pa.Table.from_pydict({name: values[order] for name, values in columns.items()}, FIRINGS)

    features.write_table(number, tables(), FIRINGS, group=FEATURE_GROUP)


def read_firings(features: RowShards, feature: int, example_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Where one SAE feature fires in chosen rows: example id → (position, activation), float64 [firings, 2]."""
    found: dict[int, np.ndarray] = {}
    for number, wanted in by_shard(example_ids).items():
        table = read_columns(
            features.complete(number),
            ["example_id", "token_position", "activation"],
            [("feature_id", "==", feature), ("example_id", "in", wanted)],
        )
        owners = table["example_id"].to_numpy()
        pairs = np.stack([table["token_position"].to_numpy(), table["activation"].to_numpy()], axis=1)
        found |= {i: pairs[owners == i] for i in wanted}
    return found


def read_fired(features: RowShards, example_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Every SAE feature that fires in chosen rows: example id → (position, feature), int64 [firings, 2]."""
    found: dict[int, np.ndarray] = {}
    for number, wanted in by_shard(example_ids).items():
        table = read_columns(
            features.complete(number), ["example_id", "token_position", "feature_id"], [("example_id", "in", wanted)]
        )
        owners = table["example_id"].to_numpy()
        pairs = np.stack([table[name].to_numpy() for name in ("token_position", "feature_id")], axis=1)
        order = np.argsort(owners, kind="stable")
        begins, ends = (np.searchsorted(owners[order], wanted, side=side) for side in SIDES)
        parts = (pairs[order[begin:end]] for begin, end in zip(begins, ends, strict=True))
        found |= {i: part.astype(np.int64) for i, part in zip(wanted, parts, strict=True)}
    return found


def _tensor(path: Path, name: str) -> np.ndarray:
    with open_tensors(path, "numpy") as file:
        return file.get_tensor(name)


def _read_block(path: Path, start: int, size: int) -> np.ndarray:
    with open_tensors(path, "numpy") as file:
        return file.get_slice("activations")[start : start + size]
