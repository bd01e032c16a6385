"""Groups of rows: by SAE feature, source, flag or metadata."""

from __future__ import annotations

import pandas as pd

from concept_audit.errors import ConceptError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import json_pointer

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
    scored = "(SELECT example_id, score FROM main.ranking_scores WHERE ranking_id = $1) s"
    if by == FEATURE:
        joined = f"""SELECT 'sae:' || a.feature_id AS "group", f.label, example_id, s.score
                     FROM {scored} JOIN main.feature_activations a USING (example_id)
                     JOIN main.sae_features f ON f.feature_id = a.feature_id WHERE f.n_examples >= $3"""
        return _summarised(cursor, joined, [ranking, large, LEAST_ROWS])
    more: list[str]
    if by == SOURCE:
        value, more = "e.source", []
    elif by == FLAG:
        value, more = "coalesce(g.flag, 'not flagged')", []
    else:
        found = cursor.execute("SELECT n_values FROM audit.base.metadata_fields WHERE field = ?", [by]).fetchone()
        if found is None:
            raise ConceptError(f"group by {by!r}: no such metadata field")
        if found[0] > MOST_VALUES:
            raise ConceptError(f"group by {by!r}: it has {found[0]:,} values; choose a field of at most {MOST_VALUES}")
        value, more = "coalesce(json_extract_string(e.metadata, $3), 'none')", [json_pointer(by)]
    joined = f"""SELECT {value} AS "group", {value} AS label, example_id, s.score
                 FROM {scored} JOIN main.examples e USING (example_id)
                 LEFT JOIN base.flags g USING (content_hash)"""
    return _summarised(cursor, joined, [ranking, large, *more])


def _summarised(cursor: Cursor, joined: str, parameters: list) -> pd.DataFrame:
    return cursor.execute(
        f"""SELECT "group", label, count(*) AS n_rows, avg(score) AS mean, stddev_samp(score) AS deviation,
                   CASE WHEN count(*) < $2 THEN list(score ORDER BY example_id) END AS scores
            FROM ({joined}) GROUP BY "group", label ORDER BY 1""",
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
