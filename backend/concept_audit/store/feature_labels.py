"""Labels of SAE features that nobody wrote by hand, and the rows that they are made of.

What a person wrote is in ``base.feature_labels`` and always shown first; see the view ``feature_labels``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import pandas as pd

from concept_audit.metrics import Estimate
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.queries import FEATURE_ORDER

Origin = Literal["endpoint", "import", "words", "tokens"]


@dataclass(frozen=True)
class MadeLabel:
    """A label and what is known of it.

    Attributes:
        origin: ``words`` (log-odds), ``tokens`` (the automatic one, here for its score), ``endpoint`` or ``import``.
        maker: the endpoint's model, or the file that it came from.
        score: balanced accuracy of telling firing from non-firing held-out texts by the label; NaN if unknown.
        snippet: text around the token on which the feature fires highest, which stands between « and ».
    """

    feature: int
    origin: Origin
    label: str
    maker: str
    score: Estimate
    snippet: str = ""


@dataclass(frozen=True)
class Firing:
    """A row in which a feature fires, and the place of its strongest token."""

    example_id: int
    position: int
    activation: float


def background_rows(cursor: Cursor, spans: Sequence[range], limit: int) -> list[int]:
    """Rows with a response of some spans of rows, drawn by their content; copies left out."""
    found = cursor.execute(
        """SELECT example_id FROM main.examples
           WHERE duplicate_of IS NULL AND n_response_tokens > 0 AND EXISTS (
               SELECT 1 FROM (SELECT unnest(?::BIGINT[]) AS first, unnest(?::BIGINT[]) AS stop)
               WHERE example_id >= first AND example_id < stop)
           ORDER BY md5(content_hash), example_id LIMIT ?""",
        [[span.start for span in spans], [span.stop for span in spans], limit],
    ).fetchall()
    return [example_id for (example_id,) in found]


def firing_sample(cursor: Cursor, feature: int, strongest: int, drawn: int) -> list[Firing]:
    """The rows in which a feature fires highest and some drawn of all in which it fires, highest first; no copies."""
    found = cursor.execute(
        """WITH firing AS MATERIALIZED (
               SELECT example_id, token_position, a.max_activation
               FROM main.feature_activations a JOIN main.examples USING (example_id)
               WHERE feature_id = ? AND duplicate_of IS NULL)
           SELECT * FROM (
               (SELECT * FROM firing ORDER BY max_activation DESC, example_id LIMIT ?)
               UNION (SELECT * FROM firing ORDER BY hash(example_id), example_id LIMIT ?))
           ORDER BY max_activation DESC, example_id""",
        [feature, strongest, drawn],
    ).fetchall()
    return [Firing(*row) for row in found]


def automatic_labels(cursor: Cursor) -> dict[int, str]:
    """SAE features that fire on the data → the label of their tokens; those first that stand out."""
    found = cursor.execute(
        f"SELECT feature_id, label FROM audit.main.sae_features WHERE density > 0 ORDER BY {FEATURE_ORDER['telling']}, 1"
    )
    return dict(found.fetchall())


def labels(cursor: Cursor) -> pd.DataFrame:
    """Every label: feature_id, layer, label, origin, maker, score, low, high, n, snippet, made_at, place (1 is shown)."""
    return cursor.execute(
        """SELECT feature_id, f.layer, l.label, origin, maker, score, low, high, n, snippet, made_at, place
           FROM main.feature_labels l JOIN audit.main.sae_features f USING (feature_id) ORDER BY feature_id, place"""
    ).df()


def label_of(cursor: Cursor, feature: int) -> pd.DataFrame:
    """As `labels`, of one feature."""
    return cursor.execute(
        """SELECT feature_id, label, origin, maker, score, low, high, n, snippet, made_at, place
           FROM main.feature_labels WHERE feature_id = ? ORDER BY place""",
        [feature],
    ).df()


def labelled(cursor: Cursor, origins: Collection[str], maker: str | None = None) -> set[int]:
    """Features that have a label of one of some origins, and by this maker unless it is None."""
    found = cursor.execute(
        """SELECT DISTINCT feature_id FROM main.feature_labels
           WHERE list_contains(?::VARCHAR[], origin) AND (maker = ? OR ?)""",
        [list(origins), maker or "", maker is None],
    ).fetchall()
    return {feature for (feature,) in found}


def save_labels(cursor: Cursor, made: Sequence[MadeLabel]) -> None:
    """Keep labels; an earlier one of a feature and an origin goes."""
    meta = dict(cursor.execute("SELECT key, value FROM audit.base.meta WHERE key IN ('sae', 'build_id')").fetchall())
    now = datetime.now(UTC).replace(tzinfo=None)
    for one in made:
        score, low, high = (
            None if value != value else value for value in (one.score.value, one.score.low, one.score.high)
        )
        cursor.execute(
            "INSERT OR REPLACE INTO base.made_labels VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                *(meta["sae"], one.feature, one.origin, one.label, one.maker, score, low, high, one.score.n),
                *(one.snippet, meta["build_id"], now),
            ],
        )


def forget_labels(cursor: Cursor, feature: int, origin: Origin) -> None:
    """Forget the label of a feature that has this origin."""
    (sae,) = only_row(cursor.execute("SELECT value FROM audit.base.meta WHERE key = 'sae'"))
    cursor.execute(
        "DELETE FROM base.made_labels WHERE sae = ? AND feature_id = ? AND origin = ?", [sae, feature, origin]
    )


def n_features(cursor: Cursor) -> int:
    """How many SAE features there are, those too that never fire."""
    return only_row(cursor.execute("SELECT count(*) FROM audit.main.sae_features"))[0]
