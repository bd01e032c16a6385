"""Groups of rows: by SAE feature, source, flag or metadata."""

from __future__ import annotations

import pandas as pd

from concept_audit.errors import ConceptError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import json_pointer
from concept_audit.store.rankings import scores_table

FEATURE, SOURCE, FLAG = "sae_feature", "source", "flag"
LEAST_ROWS = 3
"""A feature that fires in fewer rows says nothing about a mean."""
MOST_VALUES = 200


def summaries(cursor: Cursor, ranking: int, by: str, large: int) -> pd.DataFrame:
    """Scored rows by group; a row may be in many groups, or in none.

    Args:
        by: ``sae_feature``, ``source``, ``flag``, or a metadata field.
        large: groups of at least so many rows are told by their moments alone.

    Returns:
        group, label, n_rows, mean, deviation (of the sample), scores (a list; None for a large group).

    Raises:
        ConceptError: no such metadata field, or one of more than `MOST_VALUES` values.
    """
    scored = f"(SELECT example_id, score FROM {scores_table(cursor, ranking)} WHERE ranking_id = $1) s"
    if by == FEATURE:
        joined = f"""SELECT a.feature_id AS value, example_id, s.score FROM {scored}
                     JOIN main.feature_activations a USING (example_id)"""
        named = f"""SELECT 'sae:' || value AS "group", f.label, grouped.* EXCLUDE (value)
                    FROM grouped JOIN main.sae_features f ON f.feature_id = value WHERE f.n_examples >= {LEAST_ROWS}"""
        return _summarised(cursor, joined, named, [ranking, large])
    rows = f"{scored} JOIN main.examples e USING (example_id)"
    more: list[str] = []
    if by == SOURCE:
        value = "e.source"
    elif by == FLAG:
        value, rows = "coalesce(g.flag, 'not flagged')", f"{rows} LEFT JOIN base.flags g USING (content_hash)"
    else:
        found = cursor.execute("SELECT n_values FROM audit.base.metadata_fields WHERE field = ?", [by]).fetchone()
        if found is None:
            raise ConceptError(f"group by {by!r}: no such metadata field")
        if found[0] > MOST_VALUES:
            raise ConceptError(f"group by {by!r}: it has {found[0]:,} values; choose a field of at most {MOST_VALUES}")
        value, more = "coalesce(json_extract_string(e.metadata, $3), 'none')", [json_pointer(by)]
    joined = f"SELECT {value} AS value, example_id, s.score FROM {rows}"
    named = """SELECT value AS "group", value AS label, grouped.* EXCLUDE (value) FROM grouped"""
    return _summarised(cursor, joined, named, [ranking, large, *more])


def _summarised(cursor: Cursor, joined: str, named: str, parameters: list) -> pd.DataFrame:
    # The scores of large groups are never put into lists: they would be most of all scores.
    return cursor.execute(
        f"""WITH joined AS NOT MATERIALIZED ({joined}),
            sums AS MATERIALIZED (
                SELECT value, count(*) AS n_rows, avg(score) AS mean, stddev_samp(score) AS deviation
                FROM joined GROUP BY value),
            lists AS (
                SELECT value, list(score ORDER BY example_id) AS scores FROM joined
                WHERE value IN (SELECT value FROM sums WHERE n_rows < $2) GROUP BY value),
            grouped AS (SELECT sums.*, scores FROM sums LEFT JOIN lists USING (value))
            SELECT * FROM ({named}) ORDER BY 1""",
        parameters,
    ).df()


def moments(cursor: Cursor, ranking: int) -> tuple[float, float]:
    """Mean and standard deviation of a ranking's scores."""
    mean, deviation = only_row(
        cursor.execute(
            """SELECT coalesce(avg(score), 0), coalesce(stddev_pop(score), 0)
               FROM main.ranking_scores WHERE ranking_id = ?""",
            [ranking],
        )
    )
    return mean, deviation


def spread_features(cursor: Cursor, limit: int) -> list[str]:
    """Concept ids of the SAE features whose strength differs most between rows, most first.

    The spread is the standard deviation of a feature's mean activation over all rows, those in
    which it does not fire included.
    """
    found = cursor.execute(
        """SELECT feature_id FROM (
               SELECT feature_id, sum(mean_activation) AS total, sum(mean_activation ** 2) AS squares
               FROM main.feature_activations GROUP BY feature_id
           ), (SELECT count(*) AS n FROM main.examples)
           ORDER BY squares / n - (total / n) ** 2 DESC, feature_id LIMIT ?""",
        [limit],
    ).fetchall()
    return [f"sae:{feature}" for (feature,) in found]
