"""Stages 1 and 2: rows from the source into shards, then as the model reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from concept_audit.data.documents import Split
from concept_audit.data.read import DataSet
from concept_audit.errors import DataError, ModelError
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.engine import Worker
from concept_audit.progress import Stage
from concept_audit.store.examples import read_conversations, write_rows, write_tokens
from concept_audit.store.partition import RowPartition, first_row
from concept_audit.store.shard_store import TABLE, RowShards, ShardStore
from concept_audit.types import Message, SkippedRow


def read_rows(
    store: ShardStore,
    key: str,
    data: DataSet,
    skipping_by: ChatRenderer | None,
    stage: Stage,
    split: Split | None = None,
) -> int:
    """Write every row to shards; those that an earlier run wrote are kept, and what is missing among them is not.

    Args:
        skipping_by: leave out rows that cannot be read, or that this cannot render; None to stop at the first that
            cannot be read.
        split: where to split documents; None to leave them as they are.

    Returns:
        how many rows were left out.

    Raises:
        DataError: a row cannot be read, or none is left.
    """
    skipped: list[SkippedRow] = []
    if skipping_by is None:
        examples = data.examples(split=split)
    else:
        renderer = skipping_by
        examples = data.examples(skipped.append, lambda example: renderer.check(example.messages), split)
    there, number, left_out = store.list("rows", key), 0, 0
    following = next(examples, None)
    if following is None and skipped:
        raise DataError(f"none of the {len(skipped):,} rows can be used; the first: {skipped[0].reason}")
    while following is not None:
        first, end = first_row(number), first_row(number + 1)
        drawn = chain([following], islice(examples, end - first - 1))
        if there.get(number) == end - first:
            stage.skip(sum(1 for _ in drawn))
            following = next(examples, None)
        else:
            block = []
            for example in drawn:
                block.append(example)
                stage.advance()
            # One row ahead, so that what is left out at the end of the data belongs to a shard too.
            following = next(examples, None)
            shards = RowShards(store, "rows", key, RowPartition(first + len(block)), TABLE)
            write_rows(shards, number, block, skipped)
        number, left_out = number + 1, left_out + len(skipped)
        stage.detail = f"{left_out:,} left out" if left_out else ""
        skipped.clear()
    return left_out


@dataclass(frozen=True)
class Tokenizing:
    """Rows as the model reads them: its chat template applied, cut at a length.

    Attributes:
        rows: as they were read.
        tokens: to be made.
    """

    rows: RowShards
    tokens: RowShards
    model: ModelSource
    max_tokens: int

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        return (self.tokens,)

    def open(self, worker: Worker) -> tuple[ChatRenderer, Worker]:
        return ChatRenderer(worker.model(self.model).tokenizer, self.max_tokens), worker

    def run(self, opened: tuple[ChatRenderer, Worker], number: int) -> None:
        """Tokenize one shard.

        Raises:
            DataError: the model's chat template refuses a row.
        """
        renderer, worker = opened
        conversations = read_conversations(self.rows, number)

        def units() -> Iterator[list[dict[str, Any]]]:
            for unit in self.rows.partition.units(number):
                records = []
                for example_id, content_hash, where, messages in conversations[unit]:
                    records.append(
                        _record(renderer, where, messages) | {"example_id": example_id, "content_hash": content_hash}
                    )
                    worker.advance()
                yield records

        write_tokens(self.tokens, number, units())


def _record(renderer: ChatRenderer, where: str, messages: tuple[Message, ...]) -> dict[str, Any]:
    try:
        row = renderer.render(messages)
    except ModelError as error:
        raise DataError(f"{where}: {error}") from error
    return {
        "truncated": row.truncated,
        "n_tokens": len(row.input_ids),
        "n_response_tokens": int(row.response.sum()),
        "text": row.text,
        "input_ids": row.input_ids,
        "starts": row.starts,
        "ends": row.ends,
        "parts": row.parts,
    }
