"""Documents as they are written when some of their windows are left out.

A document of which every window is kept stays as it was. Of another one the windows that are kept follow one another:
neighbours as they did, and others with an empty line between them. A document of which none is kept goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_audit.data.formats import PARQUET_BATCH, json_lines
from concept_audit.data.turns import read_text

Row = TypeVar("Row")
GAP = "\n\n"
"""Between windows that were no neighbours."""


@dataclass(frozen=True)
class KeptWindows:
    """Windows that are written, in the order of the data.

    Attributes:
        column: of the documents' text.
        document: int64 [windows], the numbers of their documents among the rows of the data.
        of: int64 [windows], how many windows these documents have.
        start, end: int64 [windows], where they lie in their text, in characters.
    """

    column: str
    document: np.ndarray
    of: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def documents(self, rows: Iterable[Row], first: int = 0) -> Iterator[tuple[int, Row, slice]]:
        """The documents of which windows are kept, out of rows of the data.

        Args:
            first: the number of the first of these rows.

        Yields:
            the place among `rows`, the row, and which windows it has here.
        """
        for place, row in enumerate(rows):
            if not len(self.document) or first + place > self.document[-1]:
                return
            low, high = np.searchsorted(self.document, [first + place, first + place + 1])
            if high > low:
                yield place, row, slice(int(low), int(high))

    def whole(self, windows: slice) -> bool:
        """Whether all windows of a document are kept."""
        return bool(self.of[windows.start] == windows.stop - windows.start)

    def left(self, value: Any, windows: slice) -> Any:
        """What is left of a document's text: a string, or a list of text parts, as it was."""
        text = read_text(value, self.column)
        spans = list(zip(self.start[windows].tolist(), self.end[windows].tolist(), strict=True))
        parts = [text[start:end] for start, end in spans]
        for place in range(1, len(parts)):
            if spans[place - 1][1] != spans[place][0]:
                parts[place] = GAP + parts[place]
        joined = "".join(parts)
        return joined if isinstance(value, str) else [{**value[0], "text": joined}]

    def of_row(self, values: Mapping[str, Any], windows: slice) -> dict[str, Any]:
        """A row with what is left of its text."""
        if self.whole(windows):
            return dict(values)
        return {**values, self.column: self.left(values[self.column], windows)}


def copy_document_lines(path: Path, kept: KeptWindows, out: BinaryIO) -> int:
    """Write documents of JSON lines: one of which every window is kept stays byte for byte.

    Returns:
        how many windows there were.
    """
    count = 0
    for _, line, windows in kept.documents(json_lines(path) or ()):
        if not kept.whole(windows):
            row = kept.of_row(json.loads(line), windows)
            line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
        out.write(line + b"\n")
        count += windows.stop - windows.start
    return count


def copy_document_table(path: Path, kept: KeptWindows, out: BinaryIO) -> int:
    """As `copy_document_lines`, of Parquet, type for type."""
    count = first = 0
    with pq.ParquetFile(path) as file, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH):
            found = list(kept.documents(range(len(batch)), first))
            first += len(batch)
            if not found:
                continue
            taken = batch.take(pa.array([place for place, _, _ in found]))
            column = batch.schema.get_field_index(kept.column)
            texts = [
                value if kept.whole(windows) else kept.left(value, windows)
                for value, (_, _, windows) in zip(taken.column(column).to_pylist(), found, strict=True)
            ]
            columns = list(taken.columns)
            columns[column] = pa.array(texts, taken.schema.field(column).type)
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
            count += sum(windows.stop - windows.start for _, _, windows in found)
    return count
