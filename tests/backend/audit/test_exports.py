"""Taking rows away: exactly the rows, in whose columns, and how they came about."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pytest

from concept_audit import Audit, RowFilter, StoreError
from concept_audit.audit import exports
from tests.conftest import write_jsonl

MONEY = RowFilter(metadata={"topic": ("money",)})


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_cleaned_data_are_the_inputs_own_lines(audit, rows, tmp_path):
    flagged = audit.rows.list(MONEY)
    audit.flags.set_matching(MONEY, "remove")
    copies = set(flagged["content_hash"])
    kept = audit.rows.list(RowFilter(flag="none"))["example_id"].tolist()
    told = audit.exports.write(tmp_path / "clean.jsonl", "jsonl", RowFilter(flag="none"), schema="own")
    assert lines(tmp_path / "clean.jsonl") == [rows[i] for i in kept]
    assert told["rows"] == 300 - audit.rows.count(RowFilter(flag="any")) and len(copies)


def test_scores_stand_beside_the_inputs_own_columns(audit, rows, tmp_path):
    audit.exports.write(tmp_path / "money.jsonl", "jsonl", MONEY, "own", "sae:3")
    ranked = audit.rank("sae:3", where=MONEY).set_index("example_id").sort_index()
    found = lines(tmp_path / "money.jsonl")
    assert [row["audit_rank"] for row in found] == ranked["rank"].tolist()
    assert [row["audit_score"] for row in found] == ranked["score"].tolist()
    assert [{k: v for k, v in row.items() if not k.startswith("audit_")} for row in found] == [
        rows[i] for i in ranked.index
    ]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_rows_come_in_batches_and_all_of_them(audit, tmp_path, monkeypatch, format):
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 7)
    out = tmp_path / f"all.{format}"
    audit.exports.write(out, format, concept="sae:3")
    read = {"csv": pd.read_csv, "jsonl": lambda p: pd.read_json(p, lines=True), "parquet": pd.read_parquet}[format](out)
    expected = audit.rank("sae:3")
    assert read["example_id"].tolist() == expected["example_id"].tolist(), "by rank"
    assert read["rank"].tolist() == expected["rank"].tolist()
    assert read["score"].tolist() == pytest.approx(expected["score"].tolist())
    assert read["response"].tolist() == expected["response"].tolist() and set(read["topic"]) == {"rivers", "money"}


def test_the_manifest_says_how_it_came_about(audit, tmp_path):
    audit.flags.set_matching(MONEY, "remove", by="Ada")
    out = tmp_path / "flagged.csv"
    audit.exports.write(out, "csv", RowFilter(flag="any", scores=(-1.0, 9.0)), concept="sae:3", by="Grace")
    told = json.loads((tmp_path / "flagged.csv.manifest.json").read_text("utf-8"))
    assert told["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert told["filters"] == {"flag": "any", "scores": [-1.0, 9.0]}
    assert told["concept"] == {
        "concept_id": "sae:3",
        "name": "feature 3",
        "version": 1,
        "layer": audit.concept("sae:3").layer,
    }
    assert (
        told["method"] == "feature_activation"
        and told["exported_by"] == "Grace"
        and told["rows"] == len(pd.read_csv(out))
    )
    assert told["flags"][0]["flagged_by"] == "Ada" and told["fingerprints"] == audit.manifest.fingerprints


def test_input_that_has_changed_is_refused_by_name(built, rows, tmp_path):
    import shutil

    copied = shutil.copytree(built, tmp_path / "audit")
    manifest = json.loads((copied / "manifest.json").read_text())
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:-1])
    manifest["configuration"] |= {"data": str(data), "beside": {}}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    audit = Audit(copied)
    with pytest.raises(StoreError, match="has changed since"):
        audit.exports.write(tmp_path / "own.jsonl", "jsonl", schema="own")
    data.unlink()
    with pytest.raises(StoreError, match="--schema audit"):
        audit.exports.write(tmp_path / "own.jsonl", "jsonl", schema="own")
    assert not (tmp_path / "own.jsonl").exists()


def test_an_export_without_rows_has_its_columns(audit, tmp_path):
    out = tmp_path / "none.csv"
    assert audit.exports.write(out, "csv", RowFilter(text="no row says this"))["rows"] == 0
    assert out.read_text().startswith("example_id,flag,note,prompt,response")


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_an_export_is_of_one_state_though_others_flag_meanwhile(audit, tmp_path, monkeypatch, format):
    audit.flags.set_matching(MONEY, "remove", by="Ada")
    expected = audit.rows.list(RowFilter(flag="any"))["example_id"].tolist()
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 7)
    real, calls = exports.queries.rows_by_id, []

    def flagged_meanwhile(cursor, ids):
        calls.append(ids)
        return real(cursor, ids)

    monkeypatch.setattr(exports.queries, "rows_by_id", flagged_meanwhile)
    read = audit.opened.read

    def others_are_quick(query):
        if len(calls) == 1:
            audit.flags.set_matching(RowFilter(), "review", by="Grace")
        return read(query)

    monkeypatch.setattr(audit.opened, "read", others_are_quick)
    out = tmp_path / f"flagged.{format}"
    told = audit.exports.write(out, format, RowFilter(flag="any"))
    found = {"csv": pd.read_csv, "jsonl": lambda p: pd.read_json(p, lines=True), "parquet": pd.read_parquet}[format](
        out
    )
    assert audit.rows.count(RowFilter(flag="review")) == 300, "the other did not flag in time"
    assert found["example_id"].tolist() == expected and set(found["flag"]) == {"remove"}
    assert told["rows"] == len(expected) and [f["flagged_by"] for f in told["flags"]] == ["Ada"]


def test_an_audit_that_is_built_anew_meanwhile_is_not_mixed_with_the_earlier(audit, tmp_path, monkeypatch):
    builds = iter(["first", "second"])
    monkeypatch.setattr(exports.queries, "build_id", lambda _cursor: next(builds))
    with pytest.raises(StoreError, match="built anew while it was exported"):
        audit.exports.write(tmp_path / "all.csv")
    assert list(tmp_path.glob("all.csv*")) == []


def test_the_inputs_own_columns_are_never_guarded_and_the_manifest_says_so(audit, rows, tmp_path, monkeypatch):
    harmful = [{"text": "=HYPERLINK(1)", "number": -1}] * len(rows)
    monkeypatch.setattr(exports, "raw_rows", lambda *_: iter(harmful))
    told = audit.exports.write(tmp_path / "own.csv", "csv", MONEY, "own")
    assert set(pd.read_csv(tmp_path / "own.csv")["text"]) == {"=HYPERLINK(1)"} and told["csv"] == "exact"


def test_rows_that_are_only_to_be_reviewed_stay_in_cleaned_data(audit, tmp_path):
    audit.flags.set_matching(RowFilter(example_ids=(0, 1)), "remove")
    audit.flags.set_matching(RowFilter(example_ids=(5, 6)), "review")
    audit.exports.write(tmp_path / "clean.csv", where=RowFilter(without_flags=("remove",)))
    kept = set(pd.read_csv(tmp_path / "clean.csv")["example_id"])
    assert {5, 6} < kept and not {0, 1} & kept


def test_input_that_loses_rows_meanwhile_is_noticed(audit, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "raw_rows", lambda *_: iter(rows[:3]))
    with pytest.raises(StoreError, match="3 of 300 rows were found again"):
        audit.exports.write(tmp_path / "own.csv", "csv", schema="own")


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_ranking_is_written_as_it_is_read_and_never_held_as_a_whole(audit, tmp_path, monkeypatch, format):
    monkeypatch.setattr(exports, "RANKED_AT_ONCE", 7)
    read, most = exports.queries.ranked_texts, []
    monkeypatch.setattr(exports.queries, "ranked_texts", lambda *asked: most.append(read(*asked)) or most[-1])
    out = tmp_path / f"ranked.{format}"
    assert audit.exports.ranked(out, "sae:3", format=format, top=25) == (25, 300)
    assert max(map(len, most)) == 7
    back = {"csv": pd.read_csv, "jsonl": lambda p: pd.read_json(p, lines=True), "parquet": pd.read_parquet}
    pd.testing.assert_frame_equal(back[format](out), audit.rankings.table("sae:3", top=25), check_dtype=False)


def test_a_ranking_that_is_thrown_away_while_it_is_written_leaves_no_file(audit, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "RANKED_AT_ONCE", 7)
    real, calls = exports.require_rankings, []

    def gone(cursor, rankings):
        calls.append(rankings)
        real(cursor, [1] if len(calls) == 2 else rankings)

    monkeypatch.setattr(exports, "require_rankings", gone)
    with pytest.raises(StoreError, match="thrown away"):
        audit.exports.ranked(tmp_path / "ranked.csv", "sae:3")
    assert not [path for path in tmp_path.iterdir() if "ranked" in path.name]
