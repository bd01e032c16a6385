"""Rankings: scores become ranks and percentiles, the same way in both databases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from concept_audit.store.cursor import Cursor

QUERY_ROWS = "query_rows"
"""Parameter of a ranking: the rows that are query examples themselves."""


def ranking_id(build_id: str, concept_id: str, version: int, method: str, parameters: Mapping[str, Any]) -> int:
    """Identify a ranking by what it is of: 63 bits of a hash.

    Being a function of its content, it tells whether a ranking exists already
    without a search, and never collides between the two databases. Which rows are
    queries follows from the queries and the build: it does not count.
    """
    told_apart = {name: value for name, value in parameters.items() if name != QUERY_ROWS}
    parts = [build_id, concept_id, version, method, told_apart]
    content = json.dumps(parts, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def insert_scores(cursor: Cursor, ranking_ids: np.ndarray, scores: np.ndarray) -> None:
    """Append scores to ``base.ranking_scores``: rank 1 is the largest, ties go by example id.

    The percentile of a row is the share of scored rows, in per cent, whose score is at most its own.

    Args:
        ranking_ids: int64 [rankings].
        scores: float64 [rows, rankings]; NaN where a row has no score.
    """
    n_rows, n_rankings = scores.shape
    raw = pa.table(  # noqa: F841 - DuckDB finds it by its name
        {
            "ranking_id": np.repeat(ranking_ids, n_rows),
            "example_id": np.tile(np.arange(n_rows), n_rankings),
            "score": scores.T.reshape(-1),
        }
    )
    cursor.execute(
        """INSERT INTO base.ranking_scores
           SELECT ranking_id, example_id, score,
                  row_number() OVER (PARTITION BY ranking_id ORDER BY score DESC, example_id) AS rank,
                  100 * cume_dist() OVER (PARTITION BY ranking_id ORDER BY score)
           FROM raw WHERE NOT isnan(score) ORDER BY ranking_id, rank"""
    )
