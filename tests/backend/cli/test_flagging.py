"""Flagging, listing, querying and deleting from the command line."""

from __future__ import annotations

import json
import shutil

import duckdb
import filelock
import pytest

from concept_audit import Audit, RowFilter
from concept_audit.cli import main
from tests.backend.test_audit import of_rows


def said(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def flagged(root) -> list[int]:
    return sorted(Audit(root).rows.list(RowFilter(flag="any"))["example_id"])


def test_the_first_rows_of_a_ranking_are_flagged_and_it_can_be_undone(audit_directory, capsys):
    first = Audit(audit_directory).rank("sae:3", top=5)
    words = ["flag", audit_directory, "--concept", "sae:3", "--top", 5, "--as", "review", "--note", "odd", "--json"]
    found = json.loads(said(capsys, *words))
    assert found["rows"] == first["content_hash"].nunique()
    assert set(first["example_id"]) <= set(flagged(audit_directory))
    log = Audit(audit_directory).flags.log()
    assert (log["action"][0], log["note"][0], log["how"][0]) == ("review", "odd", "feature_activation sae:3 top 5")
    assert f"put back as before change {found['event']}" in said(capsys, "flag", audit_directory, "--undo", "last")
    assert flagged(audit_directory) == []
    assert main(["flag", str(audit_directory), "--undo", "last"]) == 1
    assert "no change of yours" in capsys.readouterr().err


def test_rows_are_flagged_by_score_percentile_and_filter(audit_directory, capsys):
    ranked = Audit(audit_directory).rank("sae:3")
    bound = float(ranked["score"].quantile(0.9))
    said(capsys, "flag", audit_directory, "--concept", "sae:3", "--above", repr(bound))
    expected = ranked[ranked["score"] >= bound]["content_hash"]
    assert set(Audit(audit_directory).rows.list(RowFilter(flag="any"))["content_hash"]) == set(expected)
    said(capsys, "flag", audit_directory, "--flagged", "any", "--clear")
    assert flagged(audit_directory) == []
    said(capsys, "flag", audit_directory, "--concept", "sae:3", "--percentile", 95, "--where", "topic=money")
    expected = ranked[(ranked["percentile"] >= 95) & ranked["metadata"].str.contains("money")]["content_hash"]
    assert set(Audit(audit_directory).rows.list(RowFilter(flag="any"))["content_hash"]) == set(expected)
    said(capsys, "flag", audit_directory, "--text", "river", "--as", "review")
    assert (
        Audit(audit_directory).rows.count(RowFilter(flag="review"))
        >= Audit(audit_directory).rows.count(RowFilter(text="river", flag="review"))
        > 0
    )


def test_a_dry_run_counts_and_changes_nothing(audit_directory, capsys):
    words = ["flag", audit_directory, "--concept", "sae:3", "--top", 7, "--dry-run"]
    assert said(capsys, *words).startswith("7 rows would be flagged")
    assert flagged(audit_directory) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "which rows"),
        ("--top 5", "Name its --concept"),
        ("--concept sae:3", "which rows"),
        ("--where colour=red", "no such metadata field"),
        ("--where colour", "is not FIELD=VALUE"),
        ("--undo yesterday", "give last, or the number"),
        ("--undo 99", "there is none of this number"),
    ],
)
def test_flagging_asks_for_what_it_lacks(audit_directory, capsys, words, why):
    assert main(["flag", str(audit_directory), *words.split()]) == 1
    assert why in capsys.readouterr().err
    assert flagged(audit_directory) == []


def test_features_are_searched_and_concepts_listed(audit_directory, capsys):
    Audit(audit_directory).train_probe("topic", of_rows(Audit(audit_directory)))
    found = json.loads(said(capsys, "features", audit_directory, "--top", 5, "--json"))
    assert len(found) == 5 and {"feature_id", "label", "density", "top_tokens"} <= set(found[0])
    token = found[0]["top_tokens"][0].strip()
    some = json.loads(said(capsys, "features", audit_directory, token, "--order", "feature_id", "--top", 999, "--json"))
    assert found[0]["feature_id"] in [each["feature_id"] for each in some]
    assert "probe:topic" in said(capsys, "concepts", audit_directory)
    everything = json.loads(said(capsys, "concepts", audit_directory, "--all", "--json"))
    assert {"probe", "sae_feature"} == {each["kind"] for each in everything}


def test_a_query_sees_the_contract_views_and_changes_nothing(audit_directory, capsys, tmp_path):
    out = said(capsys, "sql", audit_directory, "SELECT count(*) AS n FROM examples", "--format", "csv")
    assert out == "n\n300\n"
    wanted = "concept_id = 'sae:3' AND method = 'feature_activation' AND rank <= 3"
    query = f"SELECT example_id FROM scores WHERE {wanted} ORDER BY rank"
    ids = [
        json.loads(line)["example_id"]
        for line in said(capsys, "sql", audit_directory, query, "--format", "jsonl").splitlines()
    ]
    assert ids == Audit(audit_directory).rank("sae:3", top=3)["example_id"].tolist()
    assert "300" in said(capsys, "sql", audit_directory, "SELECT count(*) FROM examples")
    refused = [
        "CREATE TABLE x AS SELECT 1",
        "DELETE FROM base.flags",
        "INSERT INTO base.meta VALUES ('a', 'b')",
        f"ATTACH '{tmp_path / 'other.duckdb'}' AS other",
        f"COPY examples TO '{tmp_path / 'x.csv'}'",
        "SELECT 1; SELECT 2",
        "DETACH workspace",
        "PRAGMA database_list",
        "",
    ]
    for query in refused:
        assert main(["sql", str(audit_directory), query]) == 1, query
        assert "one SELECT" in capsys.readouterr().err
    assert main(["sql", str(audit_directory), "SELECT * FROM nowhere"]) == 1
    assert "was refused" in capsys.readouterr().err
    assert main(["sql", str(audit_directory), "SELEKT"]) == 1
    assert not list(tmp_path.glob("*.duckdb")) and not list(tmp_path.glob("*.csv"))
    con = duckdb.connect(str(audit_directory / "workspace.duckdb"), read_only=True)
    assert con.execute("SELECT count(*) FROM base.flags").fetchone() == (0,)


def test_audits_are_listed_with_their_state(audit_directory, capsys, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    found = {each["audit"]: each for each in json.loads(said(capsys, "list", "--cache", tmp_path, "--json"))}
    assert found[str(audit_directory)]["state"] == "finished" and "damaged" in found[str(broken)]["state"]
    assert "small: finished" in said(capsys, "list", "--cache", tmp_path)
    assert "no audits yet" in said(capsys, "list", "--cache", tmp_path / "none")


def test_an_audit_is_deleted_only_when_it_is_meant(audit_directory, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["delete", str(audit_directory)]) == 1
    assert "--yes" in capsys.readouterr().err and audit_directory.exists()
    audit = Audit(audit_directory)
    audit.train_probe("topic", of_rows(audit))
    assert main(["delete", str(audit_directory), "--probe", "other", "--yes"]) == 1
    assert main(["delete", str(audit_directory), "--probe", "topic", "--yes"]) == 0
    assert Audit(audit_directory).probes.list() == [] and audit_directory.exists()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    assert main(["delete", str(thesis), "--yes"]) == 1 and thesis.exists()
    (thesis / "manifest.json").write_text('{"name": "my thesis"}')
    assert main(["delete", str(thesis), "--yes"]) == 1 and (thesis / "manifest.json").exists()
    copy = shutil.copytree(audit_directory, tmp_path / "copy")
    with filelock.FileLock(copy / "build.lock"):
        assert main(["delete", str(copy), "--yes"]) == 1
        assert "another process is at work on it; stop that first" in capsys.readouterr().err
    assert main(["delete", str(copy), "--yes"]) == 0
    assert not copy.exists()
