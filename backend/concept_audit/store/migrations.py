"""From the format of any earlier workspace to the present one, step by step.

A step takes a workspace of the number before its own to its own, whatever is in it.
All steps that are needed and the views run in one transaction: a workspace is of one
version or of another. Once released, a step is not changed any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np

from concept_audit.store import schema
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import now
from concept_audit.store.rankings import digest, ranking_id
from concept_audit.store.shard_store import ShardStore

APART = 3
"""The first format that keeps what can be computed again in a file of its own."""
DERIVED = ("rankings", "ranking_scores", "row_activations", "token_projections", "own_answers")


def make(cursor: Cursor) -> None:
    """A workspace of the present format in an empty file."""
    cursor.execute(schema.WORKSPACE_TABLES)
    _finish(cursor)


def make_derived(cursor: Cursor) -> None:
    """What is computed on demand, in an empty file."""
    cursor.execute(schema.DERIVED_TABLES)
    cursor.execute("INSERT INTO base.meta VALUES ('format', ?)", [str(schema.DERIVED_FORMAT)])


def bring_derived(cursor: Cursor, before: int | None) -> None:
    """Bring what was computed on demand from an earlier format, or None for an empty file, to the present one."""
    if before is None:
        make_derived(cursor)
        return
    for number in sorted(DERIVED_STEPS):
        if number > before:
            DERIVED_STEPS[number](cursor)
    cursor.execute("INSERT OR REPLACE INTO base.meta VALUES ('format', ?)", [str(schema.DERIVED_FORMAT)])


def bring(cursor: Cursor, before: int) -> None:
    """Bring a workspace of format `before` to the present one."""
    for number in sorted(STEPS):
        if number > before:
            STEPS[number](cursor)
    _finish(cursor)


def move_derived(cursor: Cursor, shards: ShardStore) -> None:
    """Take rankings and caches out of a workspace before `APART`; it may be repeated.

    Rankings of a probe's earlier trainings stay behind, and those at another layer, since nobody can tell any more
    which labels they were made of.

    Args:
        cursor: on ``derived``, with ``workspace`` beside it.
        shards: whose queries of influence rankings are called after the rankings.
    """
    there = _tables(cursor)
    trained = {
        name: (version, digest(np.asarray(direction, np.float32))) for name, version, direction in _probes(cursor)
    }
    found = cursor.execute(
        "SELECT ranking_id, build_id, concept_id, version, method, parameters FROM workspace.base.rankings"
    ).fetchall()
    for old, build, concept, version, method, parameters in found if "rankings" in there else []:
        values, direction = json.loads(parameters), ""
        if concept.startswith("probe:"):
            present, direction = trained.get(concept.removeprefix("probe:"), (None, ""))
            if present != version or "layer" in values:
                continue
        new = ranking_id(build, concept, version, method, values, direction)
        if cursor.execute("SELECT 1 FROM base.rankings WHERE ranking_id = ?", [new]).fetchone():
            continue
        shards.rename("influence", f"{old:016x}", f"{new:016x}")
        cursor.execute(
            "INSERT INTO base.rankings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [new, build, concept, version, direction, method, json.dumps(values), now()],
        )
        cursor.execute(
            """INSERT INTO base.ranking_scores SELECT ?, example_id, score, rank, percentile, ?
               FROM workspace.base.ranking_scores WHERE ranking_id = ? ORDER BY rank""",
            [new, values.get("engine") != "index", old],
        )
        cursor.execute(
            """INSERT OR IGNORE INTO base.token_projections SELECT content_hash, ?, "values", ?
               FROM workspace.base.token_projections WHERE direction_hash = ?""",
            [f"influence:{new}", now(), f"influence:{old}"],
        )
    kept = {
        "row_activations": "true",
        "token_projections": "NOT starts_with(direction_hash, 'influence:')",
        "own_answers": "true",
    }
    for table, condition in kept.items():
        if table in there:
            cursor.execute(
                f"INSERT OR IGNORE INTO base.{table} SELECT *, ? FROM workspace.base.{table} WHERE {condition}", [now()]
            )


def _finish(cursor: Cursor) -> None:
    cursor.execute(schema.WORKSPACE_VIEWS)
    cursor.execute("INSERT OR REPLACE INTO base.meta VALUES ('format', ?)", [str(schema.WORKSPACE_FORMAT)])


def _to_2(cursor: Cursor) -> None:
    """The log of flags, versions of probes, skips, named views, labels of features."""
    cursor.execute(
        """CREATE TABLE IF NOT EXISTS base.probe_versions (
               name VARCHAR NOT NULL, version INTEGER NOT NULL, layer INTEGER NOT NULL, fit VARCHAR NOT NULL,
               direction FLOAT[] NOT NULL, details JSON NOT NULL, model_fingerprint VARCHAR NOT NULL,
               trained_at TIMESTAMP NOT NULL, PRIMARY KEY (name, version));
           CREATE TABLE IF NOT EXISTS base.probe_skips (
               probe VARCHAR NOT NULL, content_hash VARCHAR NOT NULL, PRIMARY KEY (probe, content_hash));
           CREATE TABLE IF NOT EXISTS base.flag_log (
               event_id BIGINT PRIMARY KEY, action VARCHAR NOT NULL, note VARCHAR NOT NULL, n_texts BIGINT NOT NULL,
               how VARCHAR NOT NULL, undoes BIGINT, made_by VARCHAR NOT NULL, made_at TIMESTAMP NOT NULL);
           CREATE TABLE IF NOT EXISTS base.flag_changes (
               event_id BIGINT NOT NULL, content_hash VARCHAR NOT NULL, before STRUCT(
                   flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP), after STRUCT(
                   flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP));
           CREATE TABLE IF NOT EXISTS base.saved_views (
               name VARCHAR PRIMARY KEY, page VARCHAR NOT NULL, query VARCHAR NOT NULL, saved_by VARCHAR NOT NULL,
               saved_at TIMESTAMP NOT NULL);
           CREATE TABLE IF NOT EXISTS base.feature_labels (
               sae VARCHAR NOT NULL, feature_id INTEGER NOT NULL, label VARCHAR NOT NULL,
               labelled_by VARCHAR NOT NULL, labelled_at TIMESTAMP NOT NULL, PRIMARY KEY (sae, feature_id));"""
    )


def _to_3(cursor: Cursor) -> None:
    """Evidence in its last form, every training of a probe for good, and nothing that can be computed again."""
    cursor.execute(
        """CREATE TABLE IF NOT EXISTS base.evidence (
               evidence_id VARCHAR PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
               version INTEGER NOT NULL, number INTEGER NOT NULL, about JSON NOT NULL);
           CREATE TABLE IF NOT EXISTS base.evidence_runs (
               evidence_id VARCHAR NOT NULL, kind VARCHAR NOT NULL, method VARCHAR NOT NULL, share DOUBLE NOT NULL,
               number INTEGER NOT NULL, seed INTEGER NOT NULL, n_rows INTEGER NOT NULL, own DOUBLE, text DOUBLE,
               shown DOUBLE, preference DOUBLE, loss DOUBLE, judge DOUBLE);
           ALTER TABLE base.evidence_runs ADD COLUMN IF NOT EXISTS preference DOUBLE;
           CREATE TABLE IF NOT EXISTS base.evidence_results (
               evidence_id VARCHAR NOT NULL, measure VARCHAR NOT NULL, quantity VARCHAR NOT NULL,
               method VARCHAR NOT NULL, other VARCHAR NOT NULL, share DOUBLE NOT NULL, estimate DOUBLE, low DOUBLE,
               high DOUBLE, p DOUBLE, n INTEGER NOT NULL);
           CREATE TABLE IF NOT EXISTS base.evidence_scores (
               evidence_id VARCHAR NOT NULL, method VARCHAR NOT NULL, example_id BIGINT NOT NULL, score DOUBLE,
               label TINYINT, percentile_low DOUBLE, percentile_high DOUBLE);
           CREATE TABLE base.probe_trainings (
               name VARCHAR NOT NULL, version INTEGER NOT NULL, direction VARCHAR NOT NULL,
               PRIMARY KEY (name, version));"""
    )
    trained = cursor.execute(
        """SELECT name, version, direction FROM base.probe_versions UNION
           SELECT name, version, direction FROM base.probes"""
    ).fetchall()
    known = {(name, version): digest(np.asarray(direction, np.float32)) for name, version, direction in trained}
    # What is left of probes that were deleted tells the versions that they had.
    gone = cursor.execute(
        "SELECT DISTINCT concept_id[7:], version FROM base.evidence WHERE starts_with(concept_id, 'probe:')"
    ).fetchall()
    rows = {**{(name, version): "" for name, version in gone}, **known}
    for (name, version), direction in rows.items():
        cursor.execute("INSERT INTO base.probe_trainings VALUES (?, ?, ?)", [name, version, direction])
    for table in DERIVED:
        cursor.execute(f"DROP TABLE IF EXISTS base.{table}")
    # Events are numbered by the log itself.
    cursor.execute("DROP SEQUENCE IF EXISTS base.flag_events")


def _to_4(cursor: Cursor) -> None:
    """The views say which scores are exact; no table is another one."""


def _to_5(cursor: Cursor) -> None:
    """Labels of SAE features that nobody wrote by hand, with their origin and how well they tell firing texts."""
    cursor.execute(
        """CREATE TABLE base.made_labels (
               sae VARCHAR NOT NULL, feature_id INTEGER NOT NULL, origin VARCHAR NOT NULL, label VARCHAR NOT NULL,
               maker VARCHAR NOT NULL, score DOUBLE, low DOUBLE, high DOUBLE, n INTEGER NOT NULL,
               snippet VARCHAR NOT NULL, build_id VARCHAR NOT NULL, made_at TIMESTAMP NOT NULL,
               PRIMARY KEY (sae, feature_id, origin));"""
    )


def _derived_to_2(cursor: Cursor) -> None:
    """Scores that say whether they are exact, which no ranking's from the gradient index were."""
    cursor.execute(
        """CREATE TABLE base.scores_2 (
               ranking_id BIGINT NOT NULL, example_id BIGINT NOT NULL, score DOUBLE NOT NULL, rank BIGINT NOT NULL,
               percentile DOUBLE NOT NULL, exact BOOLEAN NOT NULL DEFAULT true);
           INSERT INTO base.scores_2
               SELECT s.*, (r.parameters->>'engine') IS DISTINCT FROM 'index'
               FROM base.ranking_scores s LEFT JOIN base.rankings r USING (ranking_id) ORDER BY ranking_id, rank;
           DROP TABLE base.ranking_scores;
           ALTER TABLE base.scores_2 RENAME TO ranking_scores;
           CREATE TABLE base.refinements (ranking_id BIGINT PRIMARY KEY, details JSON NOT NULL);"""
    )


STEPS: Mapping[int, Callable[[Cursor], None]] = {2: _to_2, 3: _to_3, 4: _to_4, 5: _to_5}
"""The format that a step leads to → the step."""
DERIVED_STEPS: Mapping[int, Callable[[Cursor], None]] = {2: _derived_to_2}
"""The same of ``derived``."""


def _tables(cursor: Cursor) -> set[str]:
    found = cursor.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = 'workspace' AND schema_name = 'base'"
    ).fetchall()
    return {name for (name,) in found}


def _probes(cursor: Cursor) -> list[tuple]:
    return cursor.execute("SELECT name, version, direction FROM workspace.base.probes").fetchall()
