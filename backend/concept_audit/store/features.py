"""What the store knows of SAE features beside their rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.metrics import NORMAL_95
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import KEEP, json_pointer
from concept_audit.store.queries import ROW_COLUMNS

QUANTILE_GROUPS = 4
LEAST_FIRING = 3
"""A feature that fires in fewer rows separates nothing."""


def similar_features(cursor: Cursor, direction: np.ndarray, limit: int, besides: int | None = None) -> pd.DataFrame:
    """SAE features by the cosine of their direction with another: feature_id, label, n_examples, cosine.

    Args:
        direction: float32 [d_model].
        besides: a feature to leave out.
    """
    return cursor.execute(
        """SELECT feature_id, f.label, n_examples,
                  list_cosine_similarity(c.direction, ?::FLOAT[]) AS cosine
           FROM main.sae_features f JOIN audit.main.concepts c ON c.concept_id = 'sae:' || feature_id
           WHERE feature_id IS DISTINCT FROM ? AND density > 0 ORDER BY cosine DESC, feature_id LIMIT ?""",
        [direction.tolist(), besides, limit],
    ).df()


def feature_activation(cursor: Cursor, features: Sequence[int]) -> np.ndarray:
    """SAE features' mean activation over the tokens of each row's responses, those that close a turn left out.

    Returns:
        float64 [rows, features]; 0 where one does not fire, NaN where a row has no response.
    """
    rows = cursor.execute("SELECT n_response_tokens FROM main.examples ORDER BY example_id").fetchnumpy()
    found = np.zeros((len(rows["n_response_tokens"]), len(features)))
    columns = {feature: column for column, feature in enumerate(features)}
    fired = cursor.execute(
        """SELECT feature_id, example_id, mean_activation FROM main.feature_activations
           WHERE feature_id IN (SELECT unnest(?::INTEGER[]))""",
        [list(features)],
    ).fetchnumpy()
    places = [columns[int(feature)] for feature in fired["feature_id"]]
    found[fired["example_id"], places] = fired["mean_activation"]
    found[rows["n_response_tokens"] == 0] = np.nan
    return found


def firings_in(cursor: Cursor, example_ids: Sequence[int]) -> dict[int, list[int]]:
    """SAE features that fire in chosen rows: feature id → of these rows, those in which it fires, highest first."""
    found: dict[int, list[int]] = {}
    for feature, example_id in cursor.execute(
        """SELECT feature_id, example_id FROM main.feature_activations
           WHERE example_id IN (SELECT unnest(?::BIGINT[])) ORDER BY feature_id, max_activation DESC, example_id""",
        [list(example_ids)],
    ).fetchall():
        found.setdefault(feature, []).append(example_id)
    return found


def decoder_directions(cursor: Cursor, features: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
    """Feature id → the layer that the SAE reads, and the feature's unit decoder direction, float32 [d_model]."""
    found = cursor.execute(
        "SELECT concept_id, layer, direction FROM main.concepts WHERE list_contains(?::VARCHAR[], concept_id)",
        [[f"sae:{feature}" for feature in features]],
    ).fetchall()
    return {int(name[4:]): (layer, np.asarray(direction, np.float32)) for name, layer, direction in found}


def rows_by_quantile(cursor: Cursor, feature: int, each: int) -> pd.DataFrame:
    """Rows in which a feature fires, in quantile groups of its highest activation there; copies left out.

    Group 1 are the strongest quarter, of which the very strongest are taken; of the other groups, rows
    drawn by their content.

    Returns:
        quantile (1 to `QUANTILE_GROUPS`), low and high (of the group's activations), group_rows,
        max_activation, then the columns of the row.
    """
    return cursor.execute(
        f"""WITH firing AS (
                SELECT example_id, max_activation, content_hash,
                       ntile({QUANTILE_GROUPS}) OVER (ORDER BY max_activation DESC, example_id) AS quantile
                FROM main.feature_activations JOIN main.examples USING (example_id)
                WHERE feature_id = $1 AND duplicate_of IS NULL),
            picked AS (
                SELECT *, count(*) OVER g AS group_rows, min(max_activation) OVER g AS low,
                       max(max_activation) OVER g AS high,
                       row_number() OVER (PARTITION BY quantile ORDER BY
                           CASE WHEN quantile = 1 THEN -max_activation END, hash(content_hash)) AS place
                FROM firing WINDOW g AS (PARTITION BY quantile))
            SELECT quantile, low, high, group_rows, max_activation, {ROW_COLUMNS}
            FROM picked JOIN main.examples e USING (example_id)
            LEFT JOIN base.flags f ON f.content_hash = e.content_hash
            WHERE place <= $2 ORDER BY quantile, place""",
        [feature, each],
    ).df()


def separating(cursor: Cursor, group: str, parameters: Sequence[Any], limit: int) -> pd.DataFrame:
    """SAE features that fire in one group of rows and not in the others, by the sureness of it.

    Args:
        group: a query of the example ids of the group, with `parameters`.

    Returns:
        feature_id, label, inside, outside (rows in which it fires), log_odds (of the odds ratio, with
        a half added to each count; Haldane 1956), low, high (95% Wald interval); those first whose
        interval is farthest from 0.
    """
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE members AS {group}", list(parameters))
    n_in = only_row(cursor.execute("SELECT count(*) FROM temp.members"))[0]
    n_all = only_row(cursor.execute("SELECT count(*) FROM main.examples"))[0]
    if not 0 < n_in < n_all:
        return pd.DataFrame(columns=["feature_id", "label", "inside", "outside", "log_odds", "low", "high"])
    return cursor.execute(
        f"""WITH counted AS (
                SELECT feature_id, count(m.example_id) AS inside, count(*) - count(m.example_id) AS outside
                FROM main.feature_activations a LEFT JOIN temp.members m USING (example_id)
                GROUP BY feature_id HAVING count(*) >= {LEAST_FIRING}),
            odds AS (
                SELECT *, ln((inside + 0.5) * ($2 - outside + 0.5) / ((outside + 0.5) * ($1 - inside + 0.5))) AS log_odds,
                       {NORMAL_95} * sqrt(1 / (inside + 0.5) + 1 / (outside + 0.5) + 1 / ($1 - inside + 0.5)
                                          + 1 / ($2 - outside + 0.5)) AS half
                FROM counted)
            SELECT feature_id, label, inside, outside, log_odds, log_odds - half AS low, log_odds + half AS high
            FROM odds JOIN main.sae_features USING (feature_id)
            ORDER BY abs(log_odds) - half DESC, feature_id LIMIT $3""",
        [n_in, n_all - n_in, limit],
    ).df()


FLAGGED = "SELECT example_id FROM main.examples JOIN base.flags USING (content_hash) WHERE flag <> ?"
LABELLED = """SELECT example_id FROM main.examples JOIN base.probe_examples USING (content_hash)
              WHERE probe = ? AND label = 1"""
VALUED = "SELECT example_id FROM main.examples WHERE json_extract_string(metadata, ?) = ?"


def group_of(kind: str, name: str, value: str = "") -> tuple[str, list[Any]]:
    """A group of rows for `separating`: ``flagged``, ``labelled`` (positive for the probe `name`) or ``metadata``."""
    if kind == "flagged":
        return FLAGGED, [KEEP]
    if kind == "labelled":
        return LABELLED, [name]
    return VALUED, [json_pointer(name), value]


def lengths(cursor: Cursor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of the rows' tokens: edges float64 [bins + 1] and counts int64 [bins]."""
    width = max(longest(cursor) / bins, 1.0)
    counted = cursor.execute(
        "SELECT least(floor(n_tokens / ?)::INTEGER, ?) AS bin, count(*) FROM main.examples GROUP BY bin",
        [width, bins - 1],
    ).fetchall()
    counts = np.zeros(bins, np.int64)
    for place, count in counted:
        counts[place] = count
    return width * np.arange(bins + 1), counts


def longest(cursor: Cursor) -> int:
    """Tokens of the longest row."""
    return only_row(cursor.execute("SELECT coalesce(max(n_tokens), 0) FROM main.examples"))[0]


def sources(cursor: Cursor) -> pd.DataFrame:
    """Where the rows came from: source, n_rows."""
    return cursor.execute(
        "SELECT source, count(*) AS n_rows FROM main.examples GROUP BY source ORDER BY 2 DESC, 1"
    ).df()
