"""Rows of the input as they were: bytes of a line, types of a table, and not what became of them on the way.

Only where input and output are of one kind. Elsewhere values go through JSON's types (`raw_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_audit.data.formats import PARQUET_BATCH, json_lines, locate
from concept_audit.data.write import Format

Copy = Callable[[BinaryIO], int]
"""Writes the chosen rows; returns how many there were."""


def copier(source: str, format: Format, chosen: np.ndarray) -> Copy | None:
    """What copies rows of a data set unchanged, or None where that cannot be done.

    Args:
        source: the data set, as `read_examples` takes it.
        format: to be written.
        chosen: int64 [rows], the numbers of the rows in the data set, ascending, from 0.
    """
    path = locate(source)
    if path is None or path.is_dir():
        return None
    if format == "jsonl" and json_lines(path) is not None:
        return lambda out: _copy_lines(path, chosen, out)
    if format == "parquet" and path.suffix.lower() == ".parquet":
        return lambda out: _copy_table(path, chosen, out)
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


def _copy_lines(path: Path, chosen: np.ndarray, out: BinaryIO) -> int:
    wanted, count = iter(chosen.tolist()), 0
    number = next(wanted, None)
    for place, line in enumerate(json_lines(path) or ()):
        if number is None:
            break
        if place == number:
            out.write(line + b"\n")
            count += 1
            number = next(wanted, None)
    return count


def _copy_table(path: Path, chosen: np.ndarray, out: BinaryIO) -> int:
    with pq.ParquetFile(path) as file, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for first, batch in _numbered(file):
            low, high = np.searchsorted(chosen, [first, first + len(batch)])
            if high > low:
                writer.write_batch(batch.take(pa.array(chosen[low:high] - first)))
    return len(chosen)


def _numbered(file: pq.ParquetFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for batch in file.iter_batches(batch_size=PARQUET_BATCH):
        yield first, batch
        first += len(batch)
