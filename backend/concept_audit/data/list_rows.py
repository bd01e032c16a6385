"""Rows that hold several responses, as they are written when some of these are left out.

Of a row with a list of responses and lists of what each of them got, the same places of all these lists are kept; a
row of which none is kept goes. Places count responses as `concept_audit.data.rollouts.unrolled` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_audit.data.formats import PARQUET_BATCH, file_rows, json_lines
from concept_audit.data.rollouts import unequal

Row = TypeVar("Row")


def kept_responses(
    rows: Iterable[tuple[Row, Mapping[str, Any]]], lists: tuple[str, ...], chosen: np.ndarray
) -> Iterator[tuple[Row, int, list[int]]]:
    """Which responses of each row are kept, of rows of which some are.

    Args:
        rows: of the data, each in whatever form with its columns; of one that cannot be read, none.
        lists: the columns of the responses, and of what they got.
        chosen: int64 [responses], their numbers in the data, ascending, from 0.

    Yields:
        the row, how many responses it has, and the places in it of those that are kept.
    """
    first = 0
    for row, values in rows:
        if not len(chosen) or first > chosen[-1]:
            return
        size = responses_in(values, lists)
        low, high = np.searchsorted(chosen, [first, first + size])
        if high > low:
            yield row, size, (chosen[low:high] - first).tolist()
        first += size


def responses_in(values: Mapping[str, Any], lists: tuple[str, ...]) -> int:
    """How many responses a row has; one that cannot be used counts for one, which was left out."""
    return 1 if unequal(values, lists) else len(values[lists[0]])


def only(values: Mapping[str, Any], lists: tuple[str, ...], kept: list[int]) -> dict[str, Any]:
    """A row with these of its responses alone."""
    return {name: [value[place] for place in kept] if name in lists else value for name, value in values.items()}


def copy_list_lines(path: Path, lists: tuple[str, ...], chosen: np.ndarray, out: BinaryIO) -> int:
    """Write the chosen responses of JSON lines: a row of which all are chosen stays byte for byte.

    Returns:
        how many responses there were.
    """
    # As they were read when the audit was built, whatever is wrong with a line.
    rows = zip(json_lines(path) or (), (row.values for row in file_rows(path)), strict=True)
    count = 0
    for line, size, kept in kept_responses(rows, lists, chosen):
        if len(kept) < size:
            line = json.dumps(only(json.loads(line), lists, kept), ensure_ascii=False).encode("utf-8", "surrogatepass")
        out.write(line + b"\n")
        count += len(kept)
    return count


def copy_list_table(path: Path, lists: tuple[str, ...], chosen: np.ndarray, out: BinaryIO) -> int:
    """As `copy_list_lines`, of Parquet, type for type."""
    count = first = 0
    with pq.ParquetFile(path) as file, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH):
            rows = batch.select(list(lists)).to_pylist()
            kept = {number: places for number, _, places in kept_responses(enumerate(rows), lists, chosen - first)}
            first += sum(responses_in(row, lists) for row in rows)
            count += sum(map(len, kept.values()))
            if kept:
                writer.write_batch(_kept(batch, lists, rows, kept))
    return count


def _kept(
    batch: pa.RecordBatch, lists: tuple[str, ...], rows: list[dict[str, Any]], kept: Mapping[int, list[int]]
) -> pa.RecordBatch:
    taken = batch.take(pa.array(list(kept)))
    columns = list(taken.columns)
    for name in lists:
        column = batch.schema.get_field_index(name)
        values = [[rows[number][name][place] for place in places] for number, places in kept.items()]
        columns[column] = pa.array(values, taken.schema.field(column).type)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
