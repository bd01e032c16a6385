"""Rankings: what tells them apart, and how scores become ranks and percentiles, the same in every database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from concept_audit.metrics import ranks_and_percentiles
from concept_audit.store.cursor import Cursor
from concept_audit.types import Concept

QUERY_ROWS = "query_rows"
"""Parameter of a ranking: the rows that are query examples themselves."""


@dataclass(frozen=True)
class RankingIdentity:
    """What a ranking is of.

    Attributes:
        ranking_id: a hash of all the rest.
        build_id: of the build whose rows it ranks.
        concept_id, version: of the concept.
        direction: a probe's digest; empty for an SAE feature, which belongs to the build.
        parameters: what tells it from others of the same concept and method, JSON values.
    """

    ranking_id: int
    build_id: str
    concept_id: str
    version: int
    direction: str
    method: str
    parameters: Mapping[str, Any]


def identify(
    build_id: str, concept: Concept, method: str, parameters: Mapping[str, Any], at: Concept | None = None
) -> RankingIdentity:
    """The identity of a ranking.

    Args:
        at: the concept as it is scored, where that is another layer than the one it was trained at.
    """
    direction = digest(concept.direction) if concept.kind == "probe" else ""
    elsewhere = at is not None and at.layer != concept.layer
    directions = f"{direction}:{digest(at.direction)}" if elsewhere and at is not None else direction
    number = ranking_id(build_id, concept.concept_id, concept.version, method, parameters, directions)
    return RankingIdentity(number, build_id, concept.concept_id, concept.version, direction, method, dict(parameters))


def ranking_id(
    build_id: str, concept_id: str, version: int, method: str, parameters: Mapping[str, Any], direction: str = ""
) -> int:
    """Identify a ranking by what it is of: 63 bits of a hash.

    Being a function of its content, it tells whether a ranking exists already
    without a search, and never collides between the databases. Which rows are
    queries follows from the queries and the build: it does not count.
    """
    told_apart = {name: value for name, value in parameters.items() if name != QUERY_ROWS}
    parts = [build_id, concept_id, version, method, told_apart, *([direction] if direction else [])]
    content = json.dumps(parts, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def digest(direction: np.ndarray) -> str:
    """Tells directions apart: 96 bits of a hash of their float32 values."""
    return hashlib.blake2b(np.asarray(direction, np.float32).tobytes(), digest_size=12).hexdigest()


def scores_table(cursor: Cursor, ranking: int) -> str:
    """The scores of the database that has a ranking, as a table of a FROM clause.

    The view of both databases would do, but hides from DuckDB between which numbers the rows' ids lie, and joins take
    five times as long.
    """
    found = cursor.execute("SELECT 1 FROM audit.base.rankings WHERE ranking_id = ?", [ranking]).fetchone()
    return "(SELECT *, true AS exact FROM audit.base.ranking_scores)" if found else "derived.base.ranking_scores"


def ranked(ranking_ids: np.ndarray, scores: np.ndarray, exact: np.ndarray | None = None) -> pa.Table:
    """The rows of ``base.ranking_scores``: rank 1 is the largest score, ties go by example id.

    The percentile of a row is the share of scored rows, in per cent, whose score is at most its own.

    Args:
        ranking_ids: int64 [rankings].
        scores: float64 [rows, rankings]; NaN where a row has no score, and no place in the table.
        exact: bool [rows], which scores are no approximation; None for all. Only ``derived`` says so of each.
    """
    parts = []
    for number, column in zip(ranking_ids, scores.T, strict=True):
        order, percentiles = ranks_and_percentiles(column)
        columns = {
            "ranking_id": np.full(len(order), number, np.int64),
            "example_id": order,
            "score": column[order].astype(np.float64),
            "rank": np.arange(1, len(order) + 1),
            "percentile": percentiles,
        }
        parts.append(pa.table(columns if exact is None else {**columns, "exact": exact[order]}))
    return pa.concat_tables(parts)


def insert_ranked(cursor: Cursor, rows: pa.Table) -> None:
    """Append what `ranked` made to ``base.ranking_scores``."""
    cursor.execute("INSERT INTO base.ranking_scores BY NAME SELECT * FROM rows")


def insert_scores(cursor: Cursor, ranking_ids: np.ndarray, scores: np.ndarray) -> None:
    """Rank scores, as `ranked`, and append them to ``base.ranking_scores``."""
    if len(ranking_ids):
        insert_ranked(cursor, ranked(ranking_ids, scores))
