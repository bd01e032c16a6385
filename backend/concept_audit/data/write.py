"""Rows as CSV, JSONL or Parquet, written as they come: memory does not grow with them."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd

from concept_audit.errors import DataError
from concept_audit.files import atomic_write

Format = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("csv", "jsonl", "parquet")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
BATCH = 1024

Record = Mapping[str, Any]
Records = Callable[[], Iterable[Record]]
"""Gives the rows anew at each call: columns are settled in a first pass, and rows written in a second."""


def write_records(
    records: Records, format: Format, out: BinaryIO, exact: bool = False, columns: Sequence[str] = ()
) -> int:
    """Write rows.

    CSV cells of text that a spreadsheet would take for a formula begin with an apostrophe, unless
    `exact`; JSONL and Parquet keep every text as it is.

    Args:
        records: gives the rows; a column is where a row first has it.
        exact: CSV that reads back as it was, and that a spreadsheet may take for formulas.
        columns: that are there even if no row has them.

    Returns:
        how many rows there were.
    """
    if format != "jsonl":
        columns = list(dict.fromkeys([*columns, *(name for record in records() for name in record)]))
    return write_columns(records, format, out, columns, exact)


def write_columns(records: Records, format: Format, out: BinaryIO, columns: Sequence[str], exact: bool = False) -> int:
    """As `write_records`, where all columns are known, and no pass over the rows has to find them."""
    if format == "jsonl":
        return _jsonl(records(), out)
    if format == "csv":
        return _csv(records(), columns, out, exact)
    return _parquet(records, columns, out)


def write_file(
    records: Records, format: Format, path: Path, exact: bool = False, columns: Sequence[str] = ()
) -> tuple[int, str]:
    """As `write_records`, to a file that is complete or absent; as `fill_file`."""
    return fill_file(lambda out: write_records(records, format, out, exact, columns), path)


def fill_file(fill: Callable[[BinaryIO], int], path: Path) -> tuple[int, str]:
    """Write a file that is complete or absent.

    Args:
        fill: writes rows, and returns how many there were.

    Returns:
        rows, and the SHA-256 of the file.

    Raises:
        StoreError: the disk is full or the place may not be written to.
    """
    with atomic_write(path) as partial:
        with partial.open("wb") as out:
            count = fill(out)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
    return count, digest


def write(frame: pd.DataFrame, format: Format, out: str | None) -> None:
    """Write a frame to the file `out`, or to standard output for None or ``-``.

    Raises:
        StoreError: the disk is full or the place may not be written to.
        DataError: Parquet, which is binary, would go to a terminal.
    """

    def records() -> Iterator[Record]:
        return (dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False))

    if out is not None and out != "-":
        write_file(records, format, Path(out), columns=list(frame.columns))
        return
    to_standard_output(records, format, columns=list(frame.columns))


def to_standard_output(records: Records, format: Format, exact: bool = False, columns: Sequence[str] = ()) -> int:
    """As `write_records`, where the next program reads it; as `fill_standard_output`."""
    return fill_standard_output(lambda out: write_records(records, format, out, exact, columns), format)


def fill_standard_output(fill: Callable[[BinaryIO], int], format: Format) -> int:
    """Write rows where the next program reads them.

    Raises:
        DataError: Parquet, which is binary, would go to a terminal.
    """
    if format == "parquet" and sys.stdout.isatty():
        raise DataError("--format parquet is binary; name a file with --out, or redirect standard output")
    count = fill(sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return count


class _UnixLines:
    """Ends each row that a `csv.writer` writes with a line feed.

    The writer itself ends rows with CR LF, since only then does it quote cells with a lone CR.
    """

    def __init__(self, out: BinaryIO):
        self._out = out

    def write(self, row: str) -> None:
        self._out.write(row.removesuffix("\r\n").encode("utf-8", "replace") + b"\n")


def _csv(records: Iterable[Record], columns: Sequence[str], out: BinaryIO, exact: bool) -> int:
    writer = csv.writer(_UnixLines(out))
    writer.writerow([_cell(name, exact) for name in columns])
    count = 0
    for record in records:
        writer.writerow([_cell(record.get(name), exact) for name in columns])
        count += 1
    return count


def _cell(value: Any, exact: bool) -> Any:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and not exact and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value


def _jsonl(records: Iterable[Record], out: BinaryIO) -> int:
    count = 0
    for record in records:
        values = {name: _plain(value) for name, value in record.items()}
        out.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        count += 1
    return count


def _parquet(records: Records, columns: Sequence[str], out: BinaryIO) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {name: pa.null() for name in columns}
    for batch in _batches(records()):
        for name in columns:
            kinds[name] = _wider(kinds[name], [_plain(record.get(name)) for record in batch])
    schema = pa.schema([(name, kinds[name] or pa.string()) for name in columns])
    count = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in _batches(records()):
            arrays = [
                pa.array([_fitting(_plain(r.get(name)), kinds[name]) for r in batch], schema.field(name).type)
                for name in columns
            ]
            writer.write_table(pa.table(arrays, schema=schema))
            count += len(batch)
    return count


def _wider(kind: Any, values: list[Any]) -> Any:
    """An Arrow type that holds what `kind` holds and these values; None if only JSON text does."""
    import pyarrow as pa

    if kind is None:
        return None
    types = {type(value) for value in values if value is not None}
    if len(types) > 1 and types != {int, float}:
        return None
    try:
        found = pa.array(values).type
        one = pa.unify_schemas([pa.schema([("x", kind)]), pa.schema([("x", found)])], promote_options="permissive")
    except (pa.ArrowException, OverflowError):
        return None
    wider = one.field("x").type
    # Text is never the common type of numbers and text: what was a number has to stay one.
    mixed = pa.types.is_string(wider) and not all(pa.types.is_string(t) or pa.types.is_null(t) for t in (kind, found))
    return None if mixed else wider


def _fitting(value: Any, kind: Any) -> Any:
    if kind is not None or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    rest = iter(records)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _plain(value: Any) -> Any:
    """A value of a frame or a row in JSON's types; what pandas calls missing is None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return value
