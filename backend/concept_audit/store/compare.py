"""Two rankings of the same rows, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from concept_audit.metrics import spearman_interval
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import RowFilter
from concept_audit.store.queries import ROW_COLUMNS, matching

DEPTHS = 40
ROUND_DEPTHS = (10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Agreement:
    """How far two rankings agree on the rows that pass a filter.

    Attributes:
        n_rows: rows that both rank.
        spearman: rank correlation.
        interval: 95% interval of it (Bonett and Wright 2000).
        depths: int64 [depths], k on a logarithmic scale.
        overlap: float64 [depths], share of the first k rows of one that are among the first k of the other.
    """

    n_rows: int
    spearman: float
    interval: tuple[float, float]
    depths: np.ndarray
    overlap: np.ndarray


def _both(one: int, other: int, where: RowFilter) -> tuple[str, list]:
    """Rows that both rank and the filter lets through, ranked anew among themselves."""
    source, condition, parameters = matching(one, where)
    return (
        f"""SELECT example_id, a_score, b_score, a_percentile, b_percentile, a_rank, b_rank,
                   row_number() OVER (ORDER BY a_rank) AS a_place, row_number() OVER (ORDER BY b_rank) AS b_place
            FROM (SELECT s.example_id, s.score AS a_score, s.percentile AS a_percentile, s.rank AS a_rank
                  FROM {source} WHERE {condition})
            JOIN (SELECT example_id, score AS b_score, percentile AS b_percentile, rank AS b_rank
                  FROM main.ranking_scores WHERE ranking_id = ?) USING (example_id)""",
        [*parameters, other],
    )


def agreement(cursor: Cursor, one: int, other: int, where: RowFilter) -> Agreement:
    """Rank correlation and overlap of the first rows, of two rankings."""
    both, parameters = _both(one, other, where)
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE compared AS SELECT a_place, b_place FROM ({both})", parameters)
    count, correlation = only_row(cursor.execute("SELECT count(*), corr(a_place, b_place) FROM temp.compared"))
    correlation = float("nan") if correlation is None else float(correlation)
    scale = np.geomspace(1, max(count, 1), DEPTHS).round().astype(np.int64)
    depths = np.unique([*(d for d in ROUND_DEPTHS if d <= count), *scale]) if count else np.array([], np.int64)
    within = dict(
        cursor.execute(
            """SELECT k, count(p.deeper) FROM (SELECT unnest(?::BIGINT[]) AS k) d
               LEFT JOIN (SELECT greatest(a_place, b_place) AS deeper FROM temp.compared) p ON p.deeper <= d.k
               GROUP BY k""",
            [depths.tolist()],
        ).fetchall()
    )
    overlap = np.array([within[int(k)] / k for k in depths])
    return Agreement(count, correlation, spearman_interval(correlation, count), depths, overlap)


def points(cursor: Cursor, one: int, other: int, where: RowFilter, limit: int) -> pd.DataFrame:
    """At most `limit` rows, the same at every call: example_id, both scores, ranks and percentiles."""
    both, parameters = _both(one, other, where)
    return cursor.execute(
        f"""SELECT example_id, a_score, b_score, a_rank, b_rank, a_percentile, b_percentile
            FROM ({both}) ORDER BY hash(example_id) LIMIT ?""",
        [*parameters, limit],
    ).df()


def disagreements(cursor: Cursor, one: int, other: int, where: RowFilter, higher: str, limit: int) -> pd.DataFrame:
    """Rows on which two rankings differ most, by percentile, with their texts.

    Args:
        higher: ``a`` for rows that the first puts higher, ``b`` for the second, ``either`` for both.
    """
    both, parameters = _both(one, other, where)
    gap = {"a": "a_percentile - b_percentile", "b": "b_percentile - a_percentile"}.get(
        higher, "abs(a_percentile - b_percentile)"
    )
    return cursor.execute(
        f"""WITH worst AS MATERIALIZED (
                SELECT example_id, a_score, b_score, a_rank, b_rank, a_percentile, b_percentile
                FROM ({both}) ORDER BY {gap} DESC, example_id LIMIT ?)
            SELECT worst.* EXCLUDE (example_id), {ROW_COLUMNS}
            FROM worst JOIN main.examples e USING (example_id) LEFT JOIN base.flags f USING (content_hash)
            ORDER BY {gap} DESC, e.example_id""",
        [*parameters, limit],
    ).df()


def scores_elsewhere(cursor: Cursor, concept_id: str, example_ids: list[int]) -> pd.DataFrame:
    """What the other stored rankings of a concept say of rows: ranking_id, method, parameters, example_id, rank, percentile."""
    return cursor.execute(
        """SELECT r.ranking_id, r.method, r.parameters, s.example_id, s.score, s.rank, s.percentile
           FROM main.rankings r JOIN main.ranking_scores s USING (ranking_id)
           WHERE r.concept_id = ? AND list_contains(?::BIGINT[], s.example_id) ORDER BY r.method, r.ranking_id""",
        [concept_id, example_ids],
    ).df()


def matrix(cursor: Cursor, concept_id: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Spearman correlations among the stored rankings of a concept.

    Returns:
        method and parameters (JSON) of each; float64 [rankings, rankings].
    """
    found = cursor.execute(
        "SELECT ranking_id, method, parameters FROM main.rankings WHERE concept_id = ? ORDER BY method, ranking_id",
        [concept_id],
    ).fetchall()
    values = np.eye(len(found))
    for i, (one, *_) in enumerate(found):
        for j, (other, *_) in enumerate(found[:i]):
            values[i, j] = values[j, i] = agreement(cursor, one, other, RowFilter()).spearman
    return [(method, parameters) for _, method, parameters in found], values


def labelled_rows(cursor: Cursor, concept_id: str) -> int:
    """How many rows have a label of the probe that a concept is, so that its direction was fitted to them."""
    return only_row(cursor.execute(f"SELECT count(*) FROM ({_LABELLED})", [concept_id]))[0]


_LABELLED = """SELECT e.example_id FROM main.examples e
    JOIN base.probe_examples x ON x.content_hash = e.content_hash AND 'probe:' || x.probe = ?"""


def in_group(cursor: Cursor, concept_id: str, group: str, parameters: list) -> pd.DataFrame:
    """The scores of every stored ranking of a concept: ranking_id, method, parameters, score, inside (of the group).

    Rows that were labelled to train the concept's probe are left out: it was fitted to them.
    """
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE members AS {group}", parameters)
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE fitted AS {_LABELLED}", [concept_id])
    return cursor.execute(
        """SELECT r.ranking_id, r.method, r.parameters, s.score, s.example_id IN (SELECT example_id FROM temp.members) AS inside
           FROM main.rankings r JOIN main.ranking_scores s USING (ranking_id)
           WHERE r.concept_id = ? AND s.example_id NOT IN (SELECT example_id FROM temp.fitted)
           ORDER BY r.method, r.ranking_id, s.rank""",
        [concept_id],
    ).df()
