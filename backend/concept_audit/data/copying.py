"""Rows of the input as they were: bytes of a line, types of a table, and not what became of them on the way.

Only where input and output are of one kind. Elsewhere values go through JSON's types (`raw_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_audit.data.document_rows import KeptWindows, copy_document_lines, copy_document_table
from concept_audit.data.formats import PARQUET_BATCH, json_lines, locate
from concept_audit.data.list_rows import copy_list_lines, copy_list_table
from concept_audit.data.write import Format

Copy = Callable[[BinaryIO], int]
"""Writes the chosen rows; returns how many there were."""


@dataclass(frozen=True)
class Swap:
    """Preference pairs whose sides change places on the way.

    Attributes:
        columns: of the chosen and of the rejected side.
        rows: the numbers of these rows in the data set.
    """

    columns: tuple[str, str]
    rows: frozenset[int]

    def swapped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its sides exchanged, in the order of its columns."""
        first, second = self.columns
        return {**values, first: values[second], second: values[first]}


def copier(
    source: str,
    format: Format,
    chosen: np.ndarray,
    swap: Swap | None = None,
    lists: tuple[str, ...] | None = None,
    windows: KeptWindows | None = None,
) -> Copy | None:
    """What copies rows of a data set unchanged, or None where that cannot be done.

    Args:
        source: the data set, as `read_examples` takes it.
        format: to be written.
        chosen: int64 [rows], the numbers of the rows in the data set, ascending, from 0.
        swap: those of them that are not copied as they are.
        lists: the columns of rows that hold several responses; `chosen` counts these then, see `kept_responses`.
        windows: of documents that were split, those that are chosen; `chosen` says nothing then.
    """
    path = locate(source)
    if path is None or path.is_dir():
        return None
    if format == "jsonl" and json_lines(path) is not None:
        if windows is not None:
            return lambda out: copy_document_lines(path, windows, out)
        if lists is not None:
            return lambda out: copy_list_lines(path, lists, chosen, out)
        return lambda out: _copy_lines(path, chosen, out, swap)
    if format == "parquet" and path.suffix.lower() == ".parquet":
        if windows is not None:
            return lambda out: copy_document_table(path, windows, out)
        if lists is not None:
            return lambda out: copy_list_table(path, lists, chosen, out)
        return lambda out: _copy_table(path, chosen, out, swap)
    return None


def places(example_ids: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """The numbers of rows in a data set, whose ids count those that were not left out.

    Args:
        example_ids: int64 [rows].
        skipped: int64 [left out], the numbers of those that were, ascending, from 0.

    Returns:
        int64 [rows].
    """
    # The k-th that was left out stands before the ids from its own number less k.
    return example_ids + np.searchsorted(skipped - np.arange(len(skipped)), example_ids, side="right")


def _copy_lines(path: Path, chosen: np.ndarray, out: BinaryIO, swap: Swap | None) -> int:
    wanted, count = iter(chosen.tolist()), 0
    number = next(wanted, None)
    for place, line in enumerate(json_lines(path) or ()):
        if number is None:
            break
        if place == number:
            if swap is not None and place in swap.rows:
                line = json.dumps(swap.swapped(json.loads(line)), ensure_ascii=False).encode("utf-8", "surrogatepass")
            out.write(line + b"\n")
            count += 1
            number = next(wanted, None)
    return count


def _copy_table(path: Path, chosen: np.ndarray, out: BinaryIO, swap: Swap | None) -> int:
    with pq.ParquetFile(path) as file, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for first, batch in _numbered(file):
            low, high = np.searchsorted(chosen, [first, first + len(batch)])
            if high > low:
                taken = batch.take(pa.array(chosen[low:high] - first))
                writer.write_batch(taken if swap is None else _swapped(taken, chosen[low:high], swap))
    return len(chosen)


def _swapped(batch: pa.RecordBatch, numbers: np.ndarray, swap: Swap) -> pa.RecordBatch:
    """A batch in which the sides of some rows are exchanged, type for type."""
    change = np.isin(numbers, list(swap.rows))
    places = np.arange(len(batch))
    sides = [batch.column(name) for name in swap.columns]
    columns = list(batch.columns)
    for name, own, other in zip(swap.columns, sides, reversed(sides), strict=True):
        mixed = pa.concat_arrays([own, other.cast(own.type)])
        columns[batch.schema.get_field_index(name)] = mixed.take(
            pa.array(np.where(change, places + len(batch), places))
        )
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _numbered(file: pq.ParquetFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for batch in file.iter_batches(batch_size=PARQUET_BATCH):
        yield first, batch
        first += len(batch)
