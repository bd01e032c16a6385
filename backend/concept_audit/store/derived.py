"""What was computed on demand and may be thrown away: rankings, token values, activations, single answers.

It lies in ``derived.duckdb``, which is bounded: what has not been asked for longest goes first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from concept_audit.errors import StoreError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.rankings import RankingIdentity, insert_ranked

BYTES = 2 << 30
"""How large the file may grow, where nobody says otherwise."""
KEPT_SHARE = 0.8
"""Of the bound, so that not every ranking that is added puts another out."""
SCORE_BYTES, ENTRY_BYTES = 16, 64
"""Of one score, and of one row of the other tables beside its values, on disk; only their ratio matters."""


class RankingGoneError(StoreError):
    """A ranking was thrown away between two looks at it; it is computed anew when asked for again."""


def save_ranking(cursor: Cursor, identity: RankingIdentity, rows: pa.Table) -> None:
    """Keep a ranking; of one concept, training, method and parameters only the last one stays.

    Rankings of the concept's earlier trainings and of earlier builds go, since no view shows them any more.

    Args:
        cursor: of a lease for deriving.
        rows: as `ranked` made them of the scores, before the lease: others wait for it.
    """
    stored = "SELECT 1 FROM base.rankings WHERE ranking_id = ?"
    if cursor.execute(stored, [identity.ranking_id]).fetchone():
        return
    parameters = json.dumps(dict(identity.parameters))
    found = cursor.execute(
        """SELECT ranking_id FROM base.rankings
           WHERE build_id <> $1 OR concept_id = $2 AND (
               version < $3 OR version = $3 AND (direction <> $4 OR method = $5 AND parameters::VARCHAR = $6))""",
        [identity.build_id, identity.concept_id, identity.version, identity.direction, identity.method, parameters],
    ).fetchall()
    drop_rankings(cursor, [number for (number,) in found])
    cursor.execute(
        "INSERT INTO base.rankings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            identity.ranking_id,
            identity.build_id,
            identity.concept_id,
            identity.version,
            identity.direction,
            identity.method,
            parameters,
            now(),
        ],
    )
    insert_ranked(cursor, rows)


def save_refined(cursor: Cursor, identity: RankingIdentity, rows: pa.Table, details: Mapping[str, Any]) -> None:
    """Put other scores in the place of a ranking's, and say how they came about; it stays the same ranking.

    Args:
        rows: as `ranked` made them.
        details: JSON values.
    """
    number = identity.ranking_id
    save_ranking(cursor, identity, rows.slice(0, 0))
    cursor.execute("DELETE FROM base.ranking_scores WHERE ranking_id = ?", [number])
    insert_ranked(cursor, rows)
    cursor.execute("INSERT OR REPLACE INTO base.refinements VALUES (?, ?)", [number, json.dumps(dict(details))])


def refinement(cursor: Cursor, ranking: int) -> dict[str, Any] | None:
    """What `save_refined` kept of a ranking; None if its scores are the first that it had."""
    found = cursor.execute("SELECT details FROM derived.base.refinements WHERE ranking_id = ?", [ranking]).fetchone()
    return json.loads(found[0]) if found else None


def drop_rankings(cursor: Cursor, ranking_ids: Sequence[int]) -> None:
    """Throw rankings away, with their scores."""
    if not ranking_ids:
        return  # to find that out would take DuckDB a look at every score
    for table in ("ranking_scores", "refinements", "rankings"):
        cursor.execute(
            f"DELETE FROM base.{table} WHERE list_contains(?::BIGINT[], ranking_id)", [list(map(int, ranking_ids))]
        )


def require_rankings(cursor: Cursor, ranking_ids: Collection[int]) -> None:
    """Raise RankingGoneError unless all these rankings are there, of the present training of a concept or not."""
    found = only_row(
        cursor.execute(
            """SELECT count(DISTINCT ranking_id) FROM (
                   SELECT ranking_id FROM audit.base.rankings UNION ALL SELECT ranking_id FROM derived.base.rankings)
               WHERE list_contains(?::BIGINT[], ranking_id)""",
            [list(ranking_ids)],
        )
    )[0]
    if found < len(set(ranking_ids)):
        raise RankingGoneError(
            "a ranking was thrown away while it was asked for; ask again, and give derived.duckdb more room if it "
            "happens often (CONCEPT_AUDIT_DERIVED_BYTES)"
        )


def cached_activations(cursor: Cursor, reader: str, layer: int, hashes: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean response activations kept for texts outside the data: content_hash → float32 [d_model]."""
    found = cursor.execute(
        """SELECT content_hash, activation FROM derived.base.row_activations
           WHERE model_fingerprint = ? AND layer = ? AND list_contains(?::VARCHAR[], content_hash)""",
        [reader, layer, list(hashes)],
    ).fetchall()
    return {content_hash: np.asarray(values, np.float32) for content_hash, values in found}


def cache_activations(cursor: Cursor, reader: str, means: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """Keep activations: content_hash → layer → float32 [d_model]."""
    entries = [(h, layer, values) for h, layers in means.items() for layer, values in layers.items()]
    rows = pa.table(  # noqa: F841 - DuckDB finds it by its name
        {
            "content_hash": pa.array([h for h, _, _ in entries], pa.string()),
            "layer": pa.array([layer for _, layer, _ in entries], pa.int32()),
            "activation": pa.array([values for _, _, values in entries], pa.list_(pa.float32())),
        }
    )
    cursor.execute(
        "INSERT OR REPLACE INTO base.row_activations SELECT content_hash, ?, layer, activation, ?::TIMESTAMP FROM rows",
        [reader, now()],
    )


def cached_projections(cursor: Cursor, direction: str, hashes: Sequence[str]) -> dict[str, np.ndarray]:
    """Token values kept for heatmaps: content_hash → float32 [tokens]."""
    found = cursor.execute(
        """SELECT content_hash, values FROM derived.base.token_projections
           WHERE direction_hash = ? AND list_contains(?::VARCHAR[], content_hash)""",
        [direction, list(hashes)],
    ).fetchall()
    return {content_hash: np.asarray(values, np.float32) for content_hash, values in found}


def cache_projections(cursor: Cursor, direction: str, values: Mapping[str, np.ndarray]) -> None:
    """Keep token values for heatmaps."""
    rows = pa.table(  # noqa: F841 - as above
        {
            "content_hash": pa.array(list(values), pa.string()),
            "values": pa.array(list(values.values()), pa.list_(pa.float32())),
        }
    )
    cursor.execute(
        'INSERT OR REPLACE INTO base.token_projections SELECT content_hash, ?, "values", ?::TIMESTAMP FROM rows',
        [direction, now()],
    )


def own_answers(cursor: Cursor, reader: str, hashes: Sequence[str]) -> dict[str, str]:
    """What a model itself answers, where it was asked for single rows: content_hash → text."""
    found = cursor.execute(
        """SELECT content_hash, answer FROM derived.base.own_answers
           WHERE model_fingerprint = ? AND list_contains(?::VARCHAR[], content_hash)""",
        [reader, list(hashes)],
    ).fetchall()
    return dict(found)


def keep_own_answers(cursor: Cursor, reader: str, texts: Mapping[str, str]) -> None:
    """Keep what a model itself answers: content_hash → text."""
    cursor.executemany(
        "INSERT OR REPLACE INTO base.own_answers VALUES (?, ?, ?, ?)", [[h, reader, t, now()] for h, t in texts.items()]
    )


def touch(cursor: Cursor, used: Mapping[int, datetime]) -> None:
    """Say when rankings were asked for last: ranking → time in UTC."""
    for number, when in used.items():
        cursor.execute("UPDATE base.rankings SET used = greatest(used, ?) WHERE ranking_id = ?", [when, number])


def trim(cursor: Cursor, taken: int, limit: int, keep: Collection[int], since: datetime) -> bool:
    """Throw away what has not been asked for longest, until `KEPT_SHARE` of the bound is left.

    Args:
        taken: bytes of the file that are in use.
        limit: the bound, in bytes.
        keep: rankings that are being shown.
        since: what was made or asked for after this stays too.

    Returns:
        whether anything had to go.
    """
    if taken <= limit:
        return False
    sizes = f"""
        SELECT ranking_id, used, {SCORE_BYTES} * coalesce(n, 0) + {ENTRY_BYTES} AS bytes FROM base.rankings
        LEFT JOIN (SELECT ranking_id, count(*) AS n FROM base.ranking_scores GROUP BY 1) USING (ranking_id)
        UNION ALL SELECT NULL, used, sum(4 * len(activation) + {ENTRY_BYTES}) FROM base.row_activations GROUP BY used
        UNION ALL SELECT NULL, used, sum(4 * len("values") + {ENTRY_BYTES}) FROM base.token_projections GROUP BY used
        UNION ALL SELECT NULL, used, sum(strlen(answer) + {ENTRY_BYTES}) FROM base.own_answers GROUP BY used"""
    found = cursor.execute(f"{sizes} ORDER BY used DESC").fetchall()
    budget = KEPT_SHARE * limit * sum(size for _, _, size in found) / taken
    budget -= sum(size for number, used, size in found if number in keep or used >= since)
    gone: list[int] = []
    cutoff = None
    for number, used, size in found:
        if number in keep or used >= since:
            continue
        budget -= size
        # All that is older goes too: that an entry happens to be small is no reason to keep it.
        if budget < 0:
            budget, cutoff = -1, cutoff or used
            gone += [] if number is None else [number]
    if cutoff is None:
        return False
    drop_rankings(cursor, gone)
    for table in ("row_activations", "token_projections", "own_answers"):
        cursor.execute(f"DELETE FROM base.{table} WHERE used <= ? AND used < ?", [cutoff, since])
    return True


def now() -> datetime:
    """The time in UTC, as the tables keep it."""
    return datetime.now(UTC).replace(tzinfo=None)
