"""Two rankings of the same rows, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from concept_audit.metrics import spearman_interval
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import RowFilter
from concept_audit.store.queries import ROW_COLUMNS, matching
from concept_audit.store.rankings import scores_table

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


def _both(cursor: Cursor, one: int, other: int, where: RowFilter) -> tuple[str, list]:
    """Rows that both rank and the filter lets through."""
    source, condition, parameters = matching(cursor, one, where)
    return (
        f"""SELECT example_id, a_score, b_score, a_percentile, b_percentile, a_rank, b_rank
            FROM (SELECT s.example_id, s.score AS a_score, s.percentile AS a_percentile, s.rank AS a_rank
                  FROM {source} WHERE {condition})
            JOIN (SELECT example_id, score AS b_score, percentile AS b_percentile, rank AS b_rank
                  FROM {scores_table(cursor, other)} WHERE ranking_id = ?) USING (example_id)""",
        [*parameters, other],
    )


def agreement(cursor: Cursor, one: int, other: int, where: RowFilter) -> Agreement:
    """Rank correlation and overlap of the first rows, of two rankings."""
    both, parameters = _both(cursor, one, other, where)
    ranked = f"CREATE OR REPLACE TEMP TABLE compared AS SELECT a_rank AS a_place, b_rank AS b_place FROM ({both})"
    cursor.execute(ranked, parameters)
    count, *last = only_row(cursor.execute("SELECT count(*), max(a_place), max(b_place) FROM temp.compared"))
    if count and last != [count, count]:  # else ranks among these rows are ranks among all
        cursor.execute(
            """CREATE OR REPLACE TEMP TABLE compared AS SELECT row_number() OVER (ORDER BY a_place) AS a_place,
                      row_number() OVER (ORDER BY b_place) AS b_place FROM temp.compared"""
        )
    (correlation,) = only_row(cursor.execute("SELECT corr(a_place, b_place) FROM temp.compared"))
    correlation = float("nan") if correlation is None else float(correlation)
    scale = np.geomspace(1, max(count, 1), DEPTHS).round().astype(np.int64)
    depths = np.unique([*(d for d in ROUND_DEPTHS if d <= count), *scale]) if count else np.array([], np.int64)
    found = cursor.execute("SELECT greatest(a_place, b_place) AS deeper FROM temp.compared").fetchnumpy()
    within = np.searchsorted(np.sort(np.asarray(found["deeper"])), depths, side="right")
    return Agreement(count, correlation, spearman_interval(correlation, count), depths, within / depths)


def points(cursor: Cursor, one: int, other: int, where: RowFilter, limit: int) -> pd.DataFrame:
    """At most `limit` rows, the same at every call: example_id, both scores, ranks and percentiles."""
    both, parameters = _both(cursor, one, other, where)
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
    both, parameters = _both(cursor, one, other, where)
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
    found = _stored(cursor, concept_id)
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


def ranks_of_first(cursor: Cursor, ranking: int, other: int, share: float, most: int) -> tuple[np.ndarray, int]:
    """Where one ranking puts the rows that another one puts first; rows without a score are in neither.

    Rows that the other one scores 0 are not among its first: to a feature that fires in few rows all others are alike.

    Args:
        share: of the rows, those that are first.
        most: of them at most.

    Returns:
        int64 ranks; and how many rows the ranking scores.
    """
    (count,) = only_row(
        cursor.execute(f"SELECT count(*) FROM {scores_table(cursor, ranking)} WHERE ranking_id = ?", [ranking])
    )
    found = cursor.execute(
        f"""SELECT s.rank FROM {scores_table(cursor, ranking)} s
            JOIN (SELECT example_id FROM {scores_table(cursor, other)}
                  WHERE ranking_id = ? AND rank <= ? AND score <> 0) USING (example_id)
            WHERE s.ranking_id = ?""",
        [other, min(most, round(share * count)), ranking],
    ).fetchnumpy()
    return np.asarray(found["rank"], np.int64), count


def in_group(
    cursor: Cursor, concept_id: str, group: str, parameters: list
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Each stored ranking of a concept, one at a time in memory: where it puts the rows of a group.

    Rows that were labelled to train the concept's probe are left out: it was fitted to them.

    Yields:
        method and parameters (JSON), float64 [rows] scores with rank 1 first, and bool [rows], which are of the group.
    """
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE members AS {group}", parameters)
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE fitted AS {_LABELLED}", [concept_id])
    for ranking, method, options in _stored(cursor, concept_id):
        found = cursor.execute(
            f"""SELECT score, example_id IN (SELECT example_id FROM temp.members) AS inside
               FROM {scores_table(cursor, ranking)}
               WHERE ranking_id = ? AND example_id NOT IN (SELECT example_id FROM temp.fitted) ORDER BY rank""",
            [ranking],
        ).fetchnumpy()
        yield method, options, np.asarray(found["score"]), np.asarray(found["inside"], bool)


def _stored(cursor: Cursor, concept_id: str) -> list[tuple[int, str, str]]:
    """The rankings of a concept that are in either database: id, method and parameters (JSON)."""
    return cursor.execute(
        "SELECT ranking_id, method, parameters FROM main.rankings WHERE concept_id = ? ORDER BY method, ranking_id",
        [concept_id],
    ).fetchall()
