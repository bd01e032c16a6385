"""Rows of files: JSONL and JSON, CSV and TSV, gzipped or not, and Parquet.

Every reader is a generator that holds one line or one batch at a time (a ``.json`` array is
the exception: it is parsed whole). Nothing here knows what a conversation is.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from concept_audit.errors import DataError, first_line

PARQUET_BATCH = 256
BOM = "\ufeff".encode()
LONGEST_LINE = 64 << 20
"""Bytes of one row of JSONL, or one line of CSV: more is no row, but a file of another kind or a bomb."""
LONGEST_ARRAY = 1 << 30
"""Bytes of a ``.json`` file that is one array, which is parsed whole."""
NAMES_SHOWN = 20
KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
KINDS |= {str: "a string", list: "a list", dict: "an object"}
# An escaped backslash or a surrogate pair, to be left alone; or (group 1) a surrogate by itself.
SURROGATES = re.compile(r"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})")

_csv_limit = threading.Lock()


@dataclass(frozen=True)
class Row:
    """One row as stored.

    Attributes:
        values: its columns; none if it cannot be read.
        source, unit, number: where it stands; `unit` is "line" or "row".
        problem: why it cannot be read, though those after it can; else empty.
    """

    values: Mapping[str, Any]
    source: str
    unit: str
    number: int
    problem: str = ""

    @property
    def place(self) -> str:
        """``train.jsonl line 12``"""
        return f"{self.source} {self.unit} {self.number}"


def locate(source: str | Path) -> Path | None:
    """The file or directory that `source` names, or None if it can only be a hub name.

    Raises:
        DataError: it looks like a path, and nothing is there.
    """
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        return path
    if isinstance(source, Path) or _looks_like_path(source):
        raise DataError(f"{source}: no such file or directory; check the path")
    return None


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by the reader that its name calls for.

    Raises:
        DataError: at once for a name of no known format; from the iterator for what is broken.
    """
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise DataError(
            f"{path}: its name does not end in a format that can be read; "
            f"convert or rename it to one of {', '.join(READERS)}"
        )
    return reader(path)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; lone surrogates (`\\ud800`), which UTF-8 cannot hold, become U+FFFD.

    Raises:
        DataError: broken JSON, a number too long, or values nested too deeply.
    """
    try:
        return json.loads(SURROGATES.sub(lambda m: r"\ufffd" if m[1] else m[0], text))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        problem = f"broken JSON at {line}column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:
        problem = f"JSON that cannot be read ({error})"
    raise DataError(f"{where}: {problem}; write it as `json.dumps` does")


def unreadable(path: Path, error: OSError) -> DataError:
    """What to tell the user when the system refuses a file."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check that it is a file of yours")


def kind(value: Any) -> str:
    """What a value is, in JSON's terms."""
    return KINDS.get(type(value), type(value).__name__)


def quoted(names: Iterable[str]) -> str:
    """Names as a message shows them: ``"prompt", "response"``; of very many the first."""
    each = [f'"{name}"' for name in names]
    rest = f" and {len(each) - NAMES_SHOWN:,} more" if len(each) > NAMES_SHOWN else ""
    return ", ".join(each[:NAMES_SHOWN]) + rest


def _looks_like_path(text: str) -> bool:
    path = Path(text)
    in_folder = len(path.parts) > 1 and os.path.isdir(path.parent)
    return text.startswith((".", "/", "~")) or _suffix(path) in READERS or in_folder


def _suffix(path: Path) -> str:
    """``.csv`` or, compressed, ``.csv.gz``."""
    kept = 2 if path.suffix.lower() == ".gz" else 1
    return "".join(path.suffixes[-kept:]).lower()


def _bytes(path: Path) -> Iterator[bytes]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            # Read up to a limit: a megabyte of gzip may hold a gibibyte without a line end.
            for number in count(1):
                line = file.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path.name} line {number}: longer than {LONGEST_LINE >> 20} MiB; write one row a line, "
                        "or convert the file to Parquet"
                    )
                if not line:
                    return
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path.name}: truncated or corrupt gzip ({error}); fetch or compress it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _lines(path: Path) -> Iterator[str]:
    for line in _texts(path):
        if isinstance(line, DataError):
            raise line
        yield line


def _texts(path: Path) -> Iterator[str | DataError]:
    """The lines of a file, and in place of one that is no text the reason."""
    offset = 0
    for number, line in enumerate(_bytes(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield DataError(
                f"{path.name} line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at byte "
                f"offset {offset + error.start}); convert the file to UTF-8"
            )
        else:
            yield text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def json_lines(path: Path) -> Iterator[bytes] | None:
    """The rows of a file of JSON lines byte for byte, without their line ends; None for a file of another kind.

    As many as `file_rows` gives, in the same order.
    """
    suffix = _suffix(path).removesuffix(".gz")
    if suffix == ".json":
        start = next((line for line in _bytes(path) if line.strip()), b"")
        suffix = ".json" if start.removeprefix(BOM).lstrip().startswith(b"[") else ".jsonl"
    if suffix not in (".jsonl", ".ndjson"):
        return None
    lines = (line.removeprefix(BOM) if i == 0 else line for i, line in enumerate(_bytes(path)))
    return (line.rstrip(b"\r\n") for line in lines if line.strip())


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_texts(path), start=1):
        if isinstance(line, DataError):
            yield Row({}, path.name, "line", number, str(line))
        elif line.strip():
            try:
                value = parse_json(line.rstrip(), f"{path.name} line {number}")
            except DataError as error:
                yield Row({}, path.name, "line", number, str(error))
            else:
                yield _json_row(value, path, "line", number)


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a ``.json`` file, a name that people give to one array and to JSONL alike."""
    start = next((line for line in _bytes(path) if line.strip()), b"")
    if not start.removeprefix(BOM).lstrip().startswith(b"["):
        yield from _jsonl_rows(path)
        return
    for number, value in enumerate(parse_json("".join(_of_array(path)), path.name), start=1):
        yield _json_row(value, path, "row", number)


def _of_array(path: Path) -> Iterator[str]:
    """The lines of a file that is to be parsed whole."""
    length = 0
    for line in _lines(path):
        length += len(line)
        if length > LONGEST_ARRAY:
            raise DataError(
                f"{path.name}: an array of more than {LONGEST_ARRAY >> 20:,} MiB would have to be parsed whole; write "
                "it as JSONL, one row a line"
            )
        yield line


def _json_row(value: Any, path: Path, unit: str, number: int) -> Row:
    problem = (
        ""
        if isinstance(value, dict)
        else (
            f"{path.name} {unit} {number}: {kind(value)} where an object is expected; "
            'write {"messages": [...]} (and name a file that is one array .json)'
        )
    )
    return Row({} if problem else value, path.name, unit, number, problem)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV file with a header, numbered by the line on which each begins."""
    # strict: otherwise a quote left open swallows the rest of the file into one field.
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = _next_record(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f'{path.name} line {line}: broken CSV ({error}); quote fields, and double the quotes inside them ("")'
            ) from None
        if not fields:  # a blank line
            continue
        if header is None:
            header = _checked_header(fields, f"{path.name} line {line}")
        elif len(fields) != len(header):
            problem = (
                f"{path.name} line {line}: {len(fields)} fields where the header has "
                f"{len(header)}; quote fields that contain the delimiter or a line break"
            )
            yield Row({}, path.name, "line", line, problem)
        else:
            yield Row(dict(zip(header, fields, strict=True)), path.name, "line", line)


def _next_record(reader: Iterator[list[str]]) -> list[str]:
    """The next record, however long: `csv` has one limit a process, lifted for this record."""
    with _csv_limit:
        limit = csv.field_size_limit(LONGEST_LINE)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(limit)


def _checked_header(fields: Sequence[str], place: str) -> list[str]:
    twice = sorted(name for name, times in Counter(fields).items() if times > 1)
    if twice:
        raise DataError(f"{place}: several columns are named {quoted(twice)}; rename them")
    return list(fields)


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_BATCH)
            rows = chain.from_iterable(_values(batch, path) for batch in batches)
            for number, values in enumerate(rows, start=1):
                yield Row(values, path.name, "row", number)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path.name}: truncated or corrupt Parquet after row {number} "
            f"({first_line(error)}); fetch or write it again"
        ) from error


def _values(batch: pa.RecordBatch, path: Path) -> list[dict[str, Any]]:
    """A batch as Python's values.

    Raises:
        DataError: Python has none for a value of a column, such as a date beyond the year 9999.
    """
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError, pa.ArrowException):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (OverflowError, ValueError, pa.ArrowException) as error:
                raise DataError(
                    f'{path.name}: column "{name}" has values that cannot be read ({first_line(error)}); '
                    "leave the column out, or convert it to text"
                ) from error
        raise


_LINES: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
}
READERS = _LINES | {f"{s}.gz": reader for s, reader in _LINES.items()} | {".parquet": _parquet_rows}
