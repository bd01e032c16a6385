"""A workspace of any earlier version opens with all that people did; one of a later version is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pytest

from concept_audit import StoreError
from concept_audit.store import flags, migrations, schema, workspace
from concept_audit.store.backup import check_backup
from concept_audit.store.database import database
from concept_audit.store.derived import cached_activations, cached_projections
from concept_audit.store.evidence import list_evidence, read_evidence
from concept_audit.store.layout import Layout
from concept_audit.store.queries import ranking_stored
from concept_audit.store.rankings import ranking_id
from tests.backend.store.common import PROBE, identity, write_audit

EARLIER = sorted((Path(__file__).parents[2] / "data" / "workspaces").glob("*.sql"))
DIRECTION = PROBE.direction.tolist()
AT = "TIMESTAMP '2026-01-02 03:04:05'"


@pytest.fixture(params=EARLIER, ids=lambda path: path.stem)
def earlier(request, tmp_path) -> Layout:
    """An audit with a workspace as an earlier version made it, and something in each of its tables."""
    layout = write_audit(tmp_path / "audit")
    con = duckdb.connect()
    con.execute(f"ATTACH '{layout.audit}' AS audit (READ_ONLY)")
    con.execute(f"ATTACH '{layout.workspace}' AS workspace (STORAGE_VERSION '{schema.STORAGE}'); USE workspace")
    con.execute(request.param.read_text())
    for table in tables(con):
        if table in CONTENT:
            con.execute(f"INSERT INTO base.{table} {CONTENT[table]}")
    if "flag_log" in tables(con):
        con.execute("SELECT nextval('base.flag_events'), nextval('base.flag_events')")
    con.execute("USE memory; DETACH workspace")
    con.close()
    query = layout.shards.path("influence", f"{OLD:016x}", "query.safetensors")
    query.parent.mkdir(parents=True)
    query.write_bytes(b"query")
    return layout


OLD = ranking_id("first", "probe:tone", 2, "vector_filter", {})
STALE = ranking_id("first", "probe:tone", 1, "vector_filter", {})
FEATURE = ranking_id("first", "sae:3", 1, "bm25", {"queries": "q"})
CONTENT = {
    "probes": f"VALUES ('tone', 2, 1, 'difference_of_means', {DIRECTION}, '{{\"auroc\": 0.5}}', 'm', {AT})",
    "probe_versions": f"VALUES ('tone', 1, 1, 'difference_of_means', [1, 0], '{{}}', 'm', {AT})",
    "probe_examples": f'VALUES (\'tone\', \'h1\', \'[{{"role": "user", "content": "a"}}]\', 1, {AT})',
    "probe_skips": "VALUES ('tone', 'h2')",
    "flags": f"VALUES ('h3', 'remove', 'why', 'Ada', {AT})",
    "flag_log": f"VALUES (1, 'remove', 'why', 1, 'one by one', NULL, 'Ada', {AT}), (2, 'review', '', 1, 'x', NULL, 'Ben', {AT})",
    "flag_changes": "VALUES (1, 'h3', NULL, {'flag': 'remove', 'note': 'why', 'flagged_by': 'Ada', 'flagged_at': "
    + AT
    + "})",
    "saved_views": f"VALUES ('mine', 'audit', 'a=b', 'Ada', {AT})",
    "feature_labels": f"VALUES ('s', 3, 'my own', 'Ada', {AT})",
    "evidence": "VALUES ('e', 'first', 'probe:gone', 4, 1, '{\"a\": 1}')",
    "evidence_runs": "(evidence_id, kind, method, share, number, seed, n_rows) VALUES ('e', 'base', '', 0, 0, 0, 8)",
    "evidence_results": "VALUES ('e', 'own', 'removal', 'bm25', '', 0.1, 1, 0, 2, 0.5, 3)",
    "evidence_scores": "VALUES ('e', 'bm25', 0, 1.5, 1, NULL, NULL)",
    "rankings": f"""VALUES ({OLD}, 'first', 'probe:tone', 2, 'vector_filter', '{{}}'),
                    ({STALE}, 'first', 'probe:tone', 1, 'vector_filter', '{{}}'),
                    ({FEATURE}, 'first', 'sae:3', 1, 'bm25', '{{"queries": "q"}}')""",
    "ranking_scores": f"""SELECT r, i, i, 8 - i, 12.5 * (i + 1) FROM range(8) t(i),
                          (VALUES ({OLD}), ({STALE}), ({FEATURE})) x(r)""",
    "row_activations": "VALUES ('o', 'm', 1, [1, 2])",
    "token_projections": f"VALUES ('h1', '1:abc', [1, 2]), ('h1', 'influence:{OLD}', [3, 4]), ('h1', 'influence:9', [5])",
    "own_answers": "VALUES ('h1', 'm', 'answer')",
}
PEOPLES = [name for name in CONTENT if name not in migrations.DERIVED]


def tables(con) -> set[str]:
    found = con.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'workspace'").fetchall()
    return {name for (name,) in found}


def peoples(path: Path) -> dict[str, list]:
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{path}' AS workspace (READ_ONLY)")
        return {
            name: con.execute(f"SELECT * FROM workspace.base.{name} ORDER BY ALL").fetchall()
            for name in PEOPLES
            if name in tables(con) and name != "evidence_runs"
        }


def test_everything_that_people_did_is_there(earlier):
    before = peoples(earlier.workspace)
    with database(earlier).reading() as cursor:
        (probe,) = workspace.probes(cursor)
        assert (probe.name, probe.version) == ("tone", 2)
        assert np.array_equal(probe.direction, PROBE.direction)
        assert len(workspace.labels(cursor, "tone")) == 1
        shown = cursor.execute("SELECT example_id, flag, note, flagged_by FROM flags").fetchall()
        assert shown == [(3, "remove", "why", "Ada")]
        if "evidence" in before:
            assert list_evidence(cursor)["concept_id"].tolist() == ["probe:gone"]
            assert len(read_evidence(cursor, "e").runs) == 1
        if "feature_labels" in before:
            assert cursor.execute("SELECT label FROM sae_features").fetchall() == [("my own",)]
    after = peoples(earlier.workspace)
    assert {name: after[name] for name in before} == before


def test_what_can_be_computed_again_is_moved_and_the_workspace_is_rid_of_it(earlier):
    with database(earlier).reading() as cursor:
        new = identity(PROBE.__class__(**{**vars(PROBE), "version": 2})).ranking_id
        assert new != OLD and ranking_stored(cursor, new) and ranking_stored(cursor, FEATURE)
        ranks = cursor.execute("SELECT example_id FROM scores WHERE concept_id = 'probe:tone' ORDER BY rank").fetchall()
        assert [i for (i,) in ranks] == list(range(8))[::-1]
        assert cached_activations(cursor, "m", 1, ["o"])["o"].tolist() == [1, 2]
        assert cached_projections(cursor, "1:abc", ["h1"])["h1"].tolist() == [1, 2]
        assert cached_projections(cursor, f"influence:{new}", ["h1"])["h1"].tolist() == [3, 4]
        assert cached_projections(cursor, "influence:9", ["h1"]) == {}
        assert not tables(cursor) & set(migrations.DERIVED)
    assert earlier.shards.path("influence", f"{new:016x}", "query.safetensors").read_bytes() == b"query"


def test_the_schema_is_that_of_a_new_workspace(earlier, tmp_path):
    fresh = write_audit(tmp_path / "fresh")
    assert described(earlier) == described(fresh)


def described(layout: Layout) -> dict[str, list]:
    with database(layout).reading() as cursor:
        return {
            "columns": cursor.execute(
                """SELECT table_name, column_name, data_type, is_nullable FROM duckdb_columns()
                   WHERE database_name = 'workspace' AND NOT internal ORDER BY ALL"""
            ).fetchall(),
            "constraints": cursor.execute(
                """SELECT table_name, constraint_type, constraint_column_names FROM duckdb_constraints()
                   WHERE database_name = 'workspace' ORDER BY ALL"""
            ).fetchall(),
            "views": cursor.execute(
                "SELECT view_name, sql FROM duckdb_views() WHERE database_name = 'workspace' AND NOT internal ORDER BY 1"
            ).fetchall(),
            "sequences": cursor.execute(
                "SELECT * FROM duckdb_sequences() WHERE database_name = 'workspace'"
            ).fetchall(),
        }


def test_the_workspace_as_it_was_is_kept_and_said_where(earlier):
    with duckdb.connect(str(earlier.workspace), read_only=True) as con:
        (number,) = con.execute("SELECT value FROM base.meta WHERE key = 'format'").fetchone()
    before = peoples(earlier.workspace)
    opened = database(earlier)
    with opened.reading():
        pass
    (copy,) = earlier.backups.iterdir()
    assert check_backup(copy) == int(number) and peoples(copy) == before
    (notice,) = opened.notices()
    assert str(copy) in notice
    with opened.reading():
        pass
    assert len(list(earlier.backups.iterdir())) == 1 and opened.notices() == []


def test_changes_and_versions_count_on(earlier):
    with database(earlier).writing() as cursor:
        change = flags.set_flags(cursor, ["h5"], "review", "", "Ben")
        assert workspace.save_probe(cursor, "tone", 1, "difference_of_means", PROBE.direction, {}, "m") == 3
        with_evidence = cursor.execute("SELECT count(*) FROM base.evidence").fetchone() == (1,)
        # Version 4 of a probe that is gone has left evidence.
        gone = workspace.save_probe(cursor, "gone", 1, "difference_of_means", PROBE.direction, {}, "m")
        assert gone == (5 if with_evidence else 1)
        log = flags.log(cursor, 9)["event_id"].tolist()
    assert change.event_id == max(log) and log == sorted(set(log), reverse=True)


def test_a_migration_that_fails_leaves_the_workspace_as_it_was(earlier, monkeypatch):
    before = peoples(earlier.workspace)

    def fails(cursor) -> None:
        cursor.execute("DELETE FROM base.flags")
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(migrations, "STEPS", {**migrations.STEPS, 3: fails})
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), database(earlier).reading():
                pass
    assert peoples(earlier.workspace) == before
    assert list(earlier.backups.iterdir()) == []
    with database(earlier).reading() as cursor:
        assert cursor.execute("SELECT count(*) FROM flags").fetchone() == (1,)


def test_a_workspace_of_a_newer_version_is_refused_without_bad_advice(tmp_path):
    layout = write_audit(tmp_path / "audit")
    with database(layout).writing() as cursor:
        cursor.execute("UPDATE base.meta SET value = '99' WHERE key = 'format'")
    content = layout.workspace.read_bytes()
    for lease in (database(layout).reading, database(layout).writing):
        with pytest.raises(StoreError) as refused, lease():
            pass
        assert "newer version of Concept audit" in str(refused.value)
        assert "pip install -U concept-audit" in str(refused.value)
        assert not {"delete", "remove", "--rebuild", "move it away"} & set(str(refused.value).split())
    assert layout.workspace.read_bytes() == content


def test_an_audit_of_a_newer_version_is_not_told_to_build_anew(tmp_path):
    layout = write_audit(tmp_path / "audit")
    with duckdb.connect(str(layout.audit)) as con:
        con.execute("UPDATE base.meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(StoreError, match="pip install -U concept-audit"), database(layout).reading():
        pass


def test_json_of_details_survives(earlier):
    with database(earlier).reading() as cursor:
        (probe,) = workspace.probes(cursor)
    assert json.dumps(dict(probe.details)) == '{"auroc": 0.5}'
