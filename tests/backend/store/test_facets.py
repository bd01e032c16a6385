"""Facets and the filters that they set, against pandas on the same rows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from concept_audit import Audit, BuildOptions, ModelOptions, RowFilter, build
from concept_audit.store import workspace
from tests.conftest import chat_rows, write_jsonl

ODD = "a\"b/c~d.e'f;--"
INJECTION = "y'); DROP TABLE base.flags; --"


@pytest.fixture(scope="module")
def audit(tmp_path_factory, model_directory) -> Audit:
    rows = chat_rows(60, seed=4)
    for i, row in enumerate(rows):
        row[ODD] = ["x", INJECTION, None][i % 3]
        row["length"] = [i / 4, str(i), "long", None, float("1e999")][i % 5]
        row["id"] = f"row-{i}"
    place = tmp_path_factory.mktemp("facets")
    data = str(write_jsonl(place / "rows.jsonl", rows))
    model = ModelOptions(str(model_directory), device="cpu")
    audit = Audit(build(BuildOptions(data=data, out=place / "audit", model=model, layers=(1,), sae="none")))
    direction = np.random.default_rng(0).normal(size=32).astype(np.float32)
    with audit.opened.database.writing() as cursor:
        unit = direction / np.linalg.norm(direction)
        workspace.save_probe(cursor, "p", 1, "difference_of_means", unit, {}, audit.manifest.fingerprints["model"])
    hashes = audit.rows.list()["content_hash"].tolist()
    audit.flags.set(hashes[::4], "remove")
    audit.flags.set(hashes[1::4], "keep")
    return audit


@pytest.fixture(scope="module")
def table(audit) -> pd.DataFrame:
    frame = audit.rank("p")
    for field in (ODD, "length", "id", "topic"):
        frame[field] = [json.loads(text).get(field) for text in frame["metadata"]]
    frame["flagged"] = frame["flag"] == "remove"
    return frame


def ids(frame: pd.DataFrame) -> set[int]:
    return set(frame["example_id"].tolist())


@pytest.mark.parametrize("ranked", [(), ("p", "vector_filter")])
def test_rows_with_a_value_are_left_out_and_those_without_the_field_stay(audit, table, ranked):
    left_out = RowFilter(without={ODD: (INJECTION, "none of these")})
    assert audit.rows.count(left_out, *ranked) == (table[ODD] != INJECTION).sum() > 20
    assert ids(audit.rows.list(left_out)) == ids(table[table[ODD] != INJECTION])
    assert audit.rows.count(RowFilter(without={ODD: ()}), *ranked) == len(table)
    assert audit.rows.count(RowFilter(without_sources=("rows.jsonl",)), *ranked) == 0
    assert audit.rows.count(RowFilter(without_sources=("other",)), *ranked) == len(table)


def test_a_range_keeps_numbers_however_they_are_written(audit, table):
    number = pd.to_numeric(table["length"], errors="coerce")
    expected = table[number.between(2.5, 21)]
    assert ids(audit.rows.list(RowFilter(ranges={"length": (2.5, 21)}))) == ids(expected) != set()
    assert audit.rows.count(RowFilter(ranges={"length": (2.5, 21)}), "p") == len(expected)


@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_search_looks_where_it_is_told_to(audit, table, place):
    word = "river"
    here = table[table[place].str.lower().str.contains(word)]
    found = audit.rank("p", where=RowFilter(text=word, text_in=place))
    assert ids(found) == ids(here) != ids(audit.rank("p", where=RowFilter(text=word)))
    assert ids(audit.rows.list(RowFilter(text=word, text_in=place))) == ids(here)


@pytest.mark.parametrize("ranked", [(), ("p", "vector_filter")])
def test_a_facet_counts_the_view_without_what_it_asks_of_the_field_itself(audit, table, ranked):
    view = RowFilter(text="river", metadata={ODD: ("x",)}, without={ODD: (INJECTION,)}, flag="none", tokens=(1, 10_000))
    found = audit.rows.facet(ODD, view, concept=ranked[0] if ranked else None, method=ranked[1] if ranked else None)
    words = (table["prompt"] + "\n" + table["response"]).str.lower()
    expected = table[words.str.contains("river") & ~table["flagged"]].groupby(ODD)["flagged"].agg(["size", "sum"])
    assert {v: (n, f) for v, n, f in zip(found["value"], found["n_rows"], found["n_flagged"], strict=True)} == {
        value: (row["size"], row["sum"]) for value, row in expected.iterrows()
    }
    assert set(found["n_values"]) == {2}
    topics = audit.rows.facet("topic", replace(view, flag=""))
    narrowed = table[words.str.contains("river") & (table[ODD] == "x")]
    assert dict(zip(topics["value"], topics["n_flagged"], strict=True)) == dict(
        narrowed.groupby("topic")["flagged"].sum()
    )


def test_of_many_values_the_most_frequent_come_and_a_search_finds_the_others(audit, table):
    first = audit.rows.facet("id", limit=5)
    assert len(first) == 5 and set(first["n_values"]) == {len(set(table["id"]))}
    assert audit.rows.facet("id", search="ROW-4", limit=5)["value"].tolist() == [
        "row-4",
        *(f"row-4{i}" for i in range(4)),
    ]
    assert audit.rows.facet("id", search="'; --").empty
    sources = audit.rows.facet(None, RowFilter(sources=("nowhere",)))
    assert sources["n_rows"].tolist() == [len(table)]


def test_a_histogram_counts_every_finite_number_once_and_its_bins_are_ranges_that_find_them(audit, table):
    found = audit.rows.facet_histogram("length", RowFilter(ranges={"length": (0, 1)}), bins=7)
    number = pd.to_numeric(table["length"], errors="coerce")
    number = number[np.isfinite(number)]
    assert found["n_rows"].sum() == len(number) and found["n_flagged"].sum() == table["flagged"][number.index].sum()
    assert (found["low"].min(), found["high"].max()) == (number.min(), number.max())
    for row in found.to_dict("records"):
        assert audit.rows.count(RowFilter(ranges={"length": (row["low"], row["high"])})) == row["n_rows"]
    assert audit.rows.facet_histogram("topic").empty
