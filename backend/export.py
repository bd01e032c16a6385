"""Rows as CSV, JSONL or Parquet, on standard output or in a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd

from backend.errors import DataError
from backend.store.layout import whole
from backend.store.queries import decoded_metadata

Format = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("csv", "jsonl", "parquet")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def with_metadata(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The named columns, then a column for each metadata field.

    A field that has the name of a column is called ``metadata.NAME``.
    """
    metadata = decoded_metadata(frame)
    fields = dict.fromkeys(name for row in metadata for name in row)
    taken = set(columns)
    added = {
        f"metadata.{name}" if name in taken else name: pd.Series(
            [row.get(name) for row in metadata], dtype=object
        )
        for name in fields
    }
    return pd.concat([frame[columns].reset_index(drop=True), pd.DataFrame(added)], axis=1)


def to_bytes(frame: pd.DataFrame, format: Format) -> bytes:
    """Encode a frame.

    CSV cells of text that a spreadsheet would take for a formula begin with an
    apostrophe, which spreadsheets hide; JSONL and Parquet keep every text as it is.
    """
    buffer = io.BytesIO()
    {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}[format](frame, buffer)
    return buffer.getvalue()


def write(frame: pd.DataFrame, format: Format, out: str | None) -> None:
    """Write a frame to the file `out`, or to standard output for None or ``-``.

    Raises:
        StoreError: the disk is full or the place may not be written to.
        DataError: Parquet, which is binary, would go to a terminal.
    """
    content = to_bytes(frame, format)
    if out is None or out == "-":
        if format == "parquet" and sys.stdout.isatty():
            raise DataError("--format parquet is binary; name a file with --out, or redirect standard output")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    with whole(Path(out)) as partial:
        partial.write_bytes(content)


class _UnixLines:
    """Ends each row that a `csv.writer` writes with a line feed.

    The writer itself ends rows with CR LF, since only then does it quote cells with a lone CR.
    """

    def __init__(self, out: BinaryIO):
        self._out = out

    def write(self, row: str) -> None:
        self._out.write(row.removesuffix("\r\n").encode("utf-8", "replace") + b"\n")


def _csv(frame: pd.DataFrame, out: BinaryIO) -> None:
    writer = csv.writer(_UnixLines(out))
    writer.writerow([_cell(name) for name in frame.columns])
    for row in frame.itertuples(index=False):
        writer.writerow([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return "'" + value if value.startswith(FORMULA_STARTS) else value
    return value


def _jsonl(frame: pd.DataFrame, out: BinaryIO) -> None:
    for row in frame.itertuples(index=False):
        values = dict(zip(frame.columns, map(_plain, row), strict=True))
        out.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _parquet(frame: pd.DataFrame, out: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: _uniform([_plain(value) for value in frame[name]]) for name in frame.columns}
    pq.write_table(pa.table(columns), out, compression="zstd")


def _uniform(values: list[Any]) -> list[Any]:
    """Values that Arrow can hold in one column: mixed types become JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 and not kinds & {dict} or kinds == {int, float}:
        return values
    return [
        None if v is None else v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values
    ]


def _plain(value: Any) -> Any:
    """A value of a frame in JSON's types; what pandas calls missing is None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return value
