"""Stage 1: rows from the source into shards, tokenized as the model reads them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from concept_audit.errors import DataError, ModelError
from concept_audit.model.chat import ChatRenderer, TokenizedRow
from concept_audit.progress import Stage
from concept_audit.store.layout import ROWS_PER_SHARD, Layout
from concept_audit.store.shards import write_examples
from concept_audit.types import Example


def read_stage(layout: Layout, examples: Iterator[Example], renderer: ChatRenderer, stage: Stage) -> None:
    """Write every row to the shards of examples; shards that an earlier run wrote are kept.

    Raises:
        DataError: a row cannot be read, or the model's chat template refuses it.
    """
    number = len(layout.shard_numbers("examples"))
    stage.skip(sum(1 for _ in islice(examples, number * ROWS_PER_SHARD)))
    while block := list(islice(examples, ROWS_PER_SHARD)):
        rows = []
        for example in block:
            rows.append((example, _render(example, renderer)))
            stage.advance()
        write_examples(layout, number, rows)
        number += 1


def _render(example: Example, renderer: ChatRenderer) -> TokenizedRow:
    try:
        return renderer.render(example.messages)
    except ModelError as error:
        raise DataError(f"{example.source} row {example.source_row}: {error}") from error
