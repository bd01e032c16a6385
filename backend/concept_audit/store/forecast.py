"""Which rows a forecast is of, and what it says of them is kept under."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from concept_audit.store.cursor import Cursor
from concept_audit.store.filters import RowFilter
from concept_audit.store.queries import matching
from concept_audit.store.rankings import scores_table


@dataclass(frozen=True)
class ProbeDirection:
    """A probe as a forecast reads it.

    Attributes:
        direction: float32 [d_model], of unit length.
    """

    name: str
    layer: int
    direction: np.ndarray


def row_ids(cursor: Cursor, where: RowFilter) -> np.ndarray:
    """Example ids of the rows that pass a filter, int64, in the order of the data."""
    source, condition, parameters = matching(cursor, None, where)
    found = cursor.execute(f"SELECT e.example_id FROM {source} WHERE {condition} ORDER BY 1", parameters).fetchnumpy()
    return np.asarray(found["example_id"], np.int64)


def live_features(cursor: Cursor) -> pd.DataFrame:
    """SAE features that fire on the data: feature_id, label, mean_activation, n_examples, layer."""
    return cursor.execute(
        """SELECT feature_id, label, mean_activation, n_examples, layer FROM main.sae_features
           WHERE density > 0 ORDER BY feature_id"""
    ).df()


def probe_directions(cursor: Cursor, model: str, layers: tuple[int, ...]) -> list[ProbeDirection]:
    """The probes of this model at layers that are kept.

    Args:
        model: its fingerprint.
    """
    found = cursor.execute(
        """SELECT name, layer, direction FROM base.probes
           WHERE model_fingerprint = ? AND list_contains(?::INTEGER[], layer) ORDER BY name""",
        [model, list(layers)],
    ).fetchall()
    return [ProbeDirection(name, layer, np.asarray(direction, np.float32)) for name, layer, direction in found]


def removal_effects(cursor: Cursor, flagged: RowFilter) -> pd.DataFrame:
    """What the stored rankings by concept influence say of the data with and without some rows.

    Returns:
        concept_id, parameters (JSON), before and after (means of the scores), n_left_out.
    """
    rankings = cursor.execute(
        """SELECT ranking_id, concept_id, parameters FROM main.rankings WHERE method = 'concept_influence'
           ORDER BY concept_id, ranking_id"""
    ).fetchall()
    condition, parameters = flagged.sql("s.example_id")
    parts = []
    for number, concept, options in rankings:
        before, after, gone = cursor.execute(
            f"""SELECT avg(score), avg(score) FILTER (NOT inside), count(*) FILTER (inside) FROM (
                    SELECT s.score, coalesce({condition}, false) AS inside FROM {scores_table(cursor, number)} s
                    JOIN main.examples e ON e.example_id = s.example_id
                    LEFT JOIN base.flags f ON f.content_hash = e.content_hash WHERE s.ranking_id = ?)""",
            [*parameters, number],
        ).fetchall()[0]
        parts.append(
            {"concept_id": concept, "parameters": options, "before": before, "after": after, "n_left_out": gone}
        )
    return pd.DataFrame(parts, columns=["concept_id", "parameters", "before", "after", "n_left_out"])


def mean_activations(cursor: Cursor, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Mean over rows of the features' mean activations over response tokens: float64 [features].

    Args:
        rows: example ids, int64.
        features: feature ids, int64.
    """
    found = cursor.execute(
        """SELECT feature_id, sum(mean_activation::DOUBLE) AS total FROM main.feature_activations
           WHERE example_id IN (SELECT unnest(?::BIGINT[])) GROUP BY feature_id""",
        [rows.tolist()],
    ).fetchnumpy()
    totals = dict(zip(found["feature_id"].tolist(), found["total"].tolist(), strict=True))
    return np.array([totals.get(feature, 0.0) for feature in features.tolist()]) / max(len(rows), 1)


def feature_directions(cursor: Cursor, features: np.ndarray) -> np.ndarray:
    """Unit decoder directions of features, in their order: float32 [features, d_model]."""
    found = cursor.execute(
        """SELECT c.direction FROM (SELECT unnest(?::INTEGER[]) AS feature_id, generate_subscripts(?::INTEGER[], 1) AS place) w
           JOIN main.concepts c ON c.concept_id = 'sae:' || w.feature_id ORDER BY w.place""",
        [features.tolist(), features.tolist()],
    ).fetchall()
    return np.array([direction for (direction,) in found], np.float32)
