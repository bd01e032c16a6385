"""Which scores are exact: kept with a ranking, which stays the same, and made good in files of earlier versions."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest

from concept_audit.store import schema
from concept_audit.store.database import database
from concept_audit.store.derived import drop_rankings, refinement, save_ranking, save_refined
from concept_audit.store.layout import Layout
from concept_audit.store.queries import ranking_stored
from concept_audit.store.rankings import ranked
from tests.backend.store.common import PROBE, identity, write_audit

FORMATS = Path(__file__).parents[2] / "data" / "formats"
AT = "TIMESTAMP '2026-01-02 03:04:05'"
EXACT, INDEXED = identity(), identity(method="concept_influence", engine="index")


@pytest.fixture
def earlier(tmp_path) -> Layout:
    """An audit with the databases of the version before scores said whether they are exact."""
    layout = write_audit(tmp_path / "audit")
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{layout.audit}' AS audit (READ_ONLY)")
        for name, file in (("derived", "derived_1.sql"), ("workspace", "workspace_3.sql")):
            con.execute(
                f"ATTACH '{layout.root / name}.duckdb' AS {name} (STORAGE_VERSION '{schema.STORAGE}'); USE {name}"
            )
            con.execute((FORMATS / file).read_text())
        con.execute(
            f"INSERT INTO base.probes VALUES ('tone', 1, 1, 'difference_of_means', {PROBE.direction.tolist()}, '{{}}', 'm', {AT})"
        )
        con.execute("INSERT INTO base.probe_trainings VALUES ('tone', 1, ?)", [EXACT.direction])
        con.execute(f"INSERT INTO base.flags VALUES ('h3', 'remove', 'why', 'Ada', {AT})")
        con.execute("USE derived")
        for each, parameters in ((EXACT, "{}"), (INDEXED, '{"engine": "index"}')):
            con.execute(
                f"INSERT INTO base.rankings VALUES (?, 'first', 'probe:tone', 1, ?, ?, ?, {AT})",
                [each.ranking_id, EXACT.direction, each.method, parameters],
            )
            con.execute(
                "INSERT INTO base.ranking_scores SELECT ?, i, 8 - i, i + 1, 100 - 12.5 * i FROM range(8) t(i)",
                [each.ranking_id],
            )
        con.execute("USE memory; DETACH workspace; DETACH derived")
    return layout


def test_scores_of_an_earlier_version_stay_and_those_from_an_index_are_not_exact(earlier):
    opened = database(earlier)
    with opened.reading() as cursor:
        found = cursor.execute(
            "SELECT method, example_id, score, exact FROM scores WHERE concept_id = 'probe:tone'"
        ).df()
        assert cursor.execute("SELECT bool_and(exact) FROM scores WHERE concept_id = 'sae:3'").fetchone() == (True,)
        assert cursor.execute("SELECT note FROM flags").fetchall() == [("why",)]
    assert len(found) == 16 and (found["score"] == 8 - found["example_id"]).all()
    assert (found["exact"] == (found["method"] == "vector_filter")).all()
    # The workspace is brought to another format; as it was it is kept.
    assert len(list(earlier.backups.iterdir())) == 1
    with opened.deriving() as cursor:
        save_refined(cursor, INDEXED, table(INDEXED), {"done": True})
    with opened.reading() as cursor:
        assert refinement(cursor, INDEXED.ranking_id) == {"done": True}


def test_the_schema_is_that_of_new_files(earlier, tmp_path):
    described = []
    for layout in (earlier, write_audit(tmp_path / "fresh")):
        with database(layout).reading() as cursor:
            described.append(
                [
                    cursor.execute(
                        """SELECT database_name, table_name, column_name, data_type, is_nullable, column_default
                           FROM duckdb_columns() WHERE database_name IN ('workspace', 'derived') AND NOT internal
                           ORDER BY ALL"""
                    ).fetchall(),
                    cursor.execute(
                        """SELECT database_name, table_name, constraint_type, constraint_column_names
                           FROM duckdb_constraints() WHERE database_name IN ('workspace', 'derived') ORDER BY ALL"""
                    ).fetchall(),
                ]
            )
    assert described[0] == described[1]


def table(each, scores=None, exact=None):
    scores = np.arange(8.0) if scores is None else scores
    exact = np.arange(8) < 2 if exact is None else exact
    return ranked(np.array([each.ranking_id]), scores[:, None], exact)


def test_a_refined_ranking_is_the_same_ranking_with_other_scores(tmp_path):
    opened = database(write_audit(tmp_path / "audit"))
    number = INDEXED.ranking_id
    with opened.deriving() as cursor:
        save_ranking(cursor, INDEXED, table(INDEXED, exact=np.zeros(8, bool)))
        assert refinement(cursor, number) is None
    with opened.deriving() as cursor:
        save_refined(cursor, INDEXED, table(INDEXED, -np.arange(8.0)), {"scored": 2})
    with opened.deriving() as cursor:
        save_refined(cursor, INDEXED, table(INDEXED, -np.arange(8.0)), {"scored": 3})
        assert refinement(cursor, number) == {"scored": 3}
        kept = "SELECT example_id, exact FROM base.ranking_scores WHERE ranking_id = ? ORDER BY rank"
        assert cursor.execute(kept, [number]).fetchall() == [(i, i < 2) for i in range(8)]
        assert cursor.execute("SELECT count(*) FROM base.rankings").fetchone() == (1,)
        drop_rankings(cursor, [number])
        assert refinement(cursor, number) is None and not cursor.execute(kept, [number]).fetchall()


def test_scores_of_a_ranking_that_was_thrown_away_meanwhile_bring_it_back(tmp_path):
    opened = database(write_audit(tmp_path / "audit"))
    with opened.deriving() as cursor:
        save_refined(cursor, INDEXED, table(INDEXED), {"scored": 2})
        assert cursor.execute("SELECT count(*), count(*) FILTER (exact) FROM base.ranking_scores").fetchone() == (8, 2)
        assert cursor.execute("SELECT ranking_id FROM base.rankings").fetchall() == [(INDEXED.ranking_id,)]


def test_a_ranking_stays_found(earlier):
    with database(earlier).reading() as cursor:
        assert ranking_stored(cursor, EXACT.ranking_id) and ranking_stored(cursor, INDEXED.ranking_id)
