"""Tables to take away: nothing lost, and no cell that a spreadsheet would run."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest

from concept_audit.audit.metadata import with_metadata
from concept_audit.data.write import BATCH, write_records

DANGEROUS = ["=1+1", "+1", "-1", "@cmd", "\t=1", "\r=1", "\n=1"]


def to_bytes(table: pd.DataFrame, format: str, exact: bool = False) -> bytes:
    out = io.BytesIO()
    write_records(lambda: table.to_dict("records"), format, out, exact, list(table.columns))
    return out.getvalue()


def frame(texts: list[str], metadata: list[dict] | None = None) -> pd.DataFrame:
    rows = metadata or [{} for _ in texts]
    return pd.DataFrame({"score": [-1.5] * len(texts), "text": texts, "metadata": [json.dumps(m) for m in rows]})


@pytest.mark.parametrize("text", DANGEROUS)
def test_cells_that_start_a_formula_are_guarded_in_csv(text):
    table = with_metadata(frame([text], [{"note": text}]), ["score", "text"])
    back = pd.read_csv(io.BytesIO(to_bytes(table, "csv")))
    assert back["text"][0].replace("\r\n", "\n").startswith("'")
    assert back["note"][0].startswith("'")


def test_a_header_that_starts_a_formula_is_guarded():
    table = with_metadata(frame(["a"], [{"=cmd()": 1}]), ["text"])
    assert to_bytes(table, "csv").decode().splitlines()[0] == "text,'=cmd()"


def test_numbers_stay_numbers():
    back = pd.read_csv(io.BytesIO(to_bytes(with_metadata(frame(["a"], [{"n": -2}]), ["score", "text"]), "csv")))
    assert back["score"][0] == -1.5 and back["n"][0] == -2


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_other_formats_keep_every_text_as_it_is(format):
    texts = [*DANGEROUS, 'quote " and, comma', "ünï 🌍", "line\nbreak"]
    content = to_bytes(with_metadata(frame(texts), ["text"]), format)
    if format == "jsonl":
        back = [json.loads(line)["text"] for line in content.decode().split("\n") if line]
    else:
        back = pd.read_parquet(io.BytesIO(content))["text"].tolist()
    assert back == texts


def test_csv_keeps_quotes_commas_and_line_breaks():
    texts = ['quote " and, comma', "ünï 🌍", "line\nbreak", "'quoted'"]
    back = pd.read_csv(io.BytesIO(to_bytes(with_metadata(frame(texts), ["text"]), "csv")))
    assert back["text"].tolist() == texts


def test_metadata_with_the_name_of_a_column_are_told_apart():
    table = with_metadata(frame(["a"], [{"text": "other"}]), ["text"])
    assert list(table) == ["text", "metadata.text"]
    assert table["metadata.text"][0] == "other"


def test_fields_that_some_rows_lack_are_empty_there():
    table = with_metadata(frame(["a", "b"], [{"x": 1}, {"y": [1, {"z": None}]}]), ["text"])
    assert to_bytes(table, "csv").decode().splitlines()[1:] == ["a,1,", 'b,,"[1, {""z"": null}]"']
    assert json.loads(to_bytes(table, "jsonl").splitlines()[1]) == {"text": "b", "x": None, "y": [1, {"z": None}]}


def test_mixed_types_of_a_field_fit_into_parquet():
    values = [{"v": 1}, {"v": "one"}, {"v": [1]}, {"v": None}, {"v": {"a": 1}}, {"v": True}]
    table = with_metadata(frame(list("abcdef"), values), ["text"])
    back = pd.read_parquet(io.BytesIO(to_bytes(table, "parquet")))
    assert back["v"].isna().tolist() == [False, False, False, True, False, False]
    assert back["v"].dropna().tolist() == ["1", "one", "[1]", '{"a": 1}', "true"]


def test_no_rows_are_a_table_with_a_header():
    assert to_bytes(with_metadata(frame([]), ["score", "text"]), "csv").decode() == "score,text\n"


def test_exact_csv_reads_back_as_it_was():
    texts = ["=1+1", "-5", "'quoted", "plain"]
    back = pd.read_csv(io.BytesIO(to_bytes(with_metadata(frame(texts), ["text"]), "csv", exact=True)))
    assert back["text"].tolist() == texts


def test_parquet_keeps_types_that_only_later_batches_show():
    rows = [{"n": None, "m": 1, "tags": None} for _ in range(BATCH)]
    rows += [{"n": 1.5, "m": "one", "tags": ["a"], "late": True}]
    out = io.BytesIO()
    assert write_records(lambda: rows, "parquet", out) == BATCH + 1
    back = pd.read_parquet(out)
    assert back["n"].iloc[-1] == 1.5 and back["m"].tolist()[-2:] == ["1", "one"]
    assert list(back["tags"].iloc[-1]) == ["a"] and back["late"].iloc[-1]
