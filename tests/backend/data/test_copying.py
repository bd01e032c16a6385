"""Rows of the input as they were: bytes of a line, types of a table."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.copying import copier
from concept_audit.data.formats import file_rows

LINES = [
    b'{"text":   "spaces, \\u00e9 and \xc3\xa9 and \\/", "x": 1.0}',
    b'{"text": "the same key twice", "x": 1, "x": 2}',
    b'  {"text": "NaN and more digits than a float has", "x": NaN, "y": 0.1000000000000000055511151231257827}  ',
    b'{"text": "a lone surrogate \\ud800", "x": 1e400}',
    b'{"text": "no line end"}',
]


def written(copy) -> tuple[bytes, int]:
    out = io.BytesIO()
    count = copy(out)
    return out.getvalue(), count


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.jsonl.gz"])
def test_json_lines_stay_what_they_were_byte_for_byte(tmp_path, name):
    path = tmp_path / name
    content = b"\xef\xbb\xbf" + LINES[0] + b"\r\n\n   \n" + b"\n".join(LINES[1:])
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert len(list(file_rows(path))) == len(LINES)
    for chosen in ([0, 1, 2, 3, 4], [1, 3], [4], []):
        copy = copier(str(path), "jsonl", np.array(chosen, np.int64))
        assert written(copy) == (b"".join(LINES[i] + b"\n" for i in chosen), len(chosen))


def test_tables_keep_their_types(tmp_path):
    table = pa.table(
        {
            "text": pa.array([f"row {i}" for i in range(700)], pa.large_string()),
            "when": pa.array([datetime.datetime(2026, 1, 1, microsecond=i) for i in range(700)], pa.timestamp("us")),
            "price": pa.array([decimal.Decimal(i) / 100 for i in range(700)], pa.decimal128(9, 2)),
            "small": pa.array(range(700), pa.int16()),
            "odd": pa.array([float("nan")] * 700, pa.float32()),
            "turns": pa.array([[{"role": "user", "content": str(i)}] for i in range(700)]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    chosen = np.array([0, 255, 256, 257, 699], np.int64)
    content, count = written(copier(str(tmp_path / "rows.parquet"), "parquet", chosen))
    back = pq.read_table(io.BytesIO(content))
    assert count == 5 and back.schema == table.schema
    assert back.drop(["odd"]).equals(table.take(pa.array(chosen)).drop(["odd"]))
    assert np.isnan(back["odd"].to_numpy()).all()


def test_of_another_kind_nothing_is_copied(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    for name, format in (("rows.csv", "csv"), ("rows.csv", "jsonl"), ("rows.json", "jsonl")):
        assert copier(str(tmp_path / name), format, np.array([0])) is None
    assert copier("org/name", "jsonl", np.array([0])) is None
