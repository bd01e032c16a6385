"""What people did and nobody can compute: probes, their labels and versions, named views, labels of features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from concept_audit.errors import ConceptError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.examples import messages_from_json, messages_json
from concept_audit.store.rankings import digest
from concept_audit.types import PROBE_NAME, LabelledExample, ProbeFit


@dataclass(frozen=True)
class SavedProbe:
    """A trained probe as the workspace keeps it.

    Attributes:
        direction: float32 [d_model], of unit length.
        fit: ``difference_of_means`` or ``logistic_regression``.
        details: what its training reported (held-out AUROC and interval, counts, layers tried).
        model_fingerprint: of the model whose residual stream it lives in.
    """

    name: str
    version: int
    layer: int
    fit: ProbeFit
    direction: np.ndarray = field(repr=False)
    details: Mapping[str, Any]
    model_fingerprint: str


def check_probe_name(name: str) -> str:
    """The name without white space at its ends.

    Raises:
        ConceptError: it is empty, too long, or has characters that a URL or a file name would not keep.
    """
    name = name.strip()
    if not PROBE_NAME.fullmatch(name):
        raise ConceptError(
            f"probe name {name!r}: use 1 to 64 letters, digits, spaces, dots, dashes or underscores, "
            "beginning with a letter or digit"
        )
    return name


def probes(cursor: Cursor) -> list[SavedProbe]:
    """Every trained probe, by name."""
    found = cursor.execute(
        """SELECT name, version, layer, fit, direction, details, model_fingerprint
           FROM base.probes ORDER BY name"""
    ).fetchall()
    return [_saved(row) for row in found]


def _saved(row: tuple[Any, ...]) -> SavedProbe:
    name, version, layer, fit, direction, details, model = row
    return SavedProbe(name, version, layer, fit, np.asarray(direction, np.float32), json.loads(details), model)


def save_probe(
    cursor: Cursor,
    name: str,
    layer: int,
    fit: str,
    direction: np.ndarray,
    details: Mapping[str, Any],
    model_fingerprint: str,
) -> int:
    """Keep a trained probe under its name; an earlier one of that name becomes an earlier version.

    Returns:
        the probe's version, counting the trainings under its name from 1, those of deleted probes too: what hangs on
        a name and a version is of one training for ever.
    """
    version = _trainings(cursor, name) + 1
    cursor.execute("INSERT OR REPLACE INTO base.probe_versions SELECT * FROM base.probes WHERE name = ?", [name])
    cursor.execute("INSERT INTO base.probe_trainings VALUES (?, ?, ?)", [name, version, digest(direction)])
    cursor.execute(
        "INSERT OR REPLACE INTO base.probes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [name, version, layer, fit, direction.tolist(), json.dumps(dict(details)), model_fingerprint, _now()],
    )
    return version


def delete_probe(cursor: Cursor, name: str) -> None:
    """Remove a probe with its labels; that its versions have been there is not forgotten."""
    cursor.execute("DELETE FROM base.probes WHERE name = ?", [name])
    cursor.execute("DELETE FROM base.probe_versions WHERE name = ?", [name])
    cursor.execute("DELETE FROM base.probe_examples WHERE probe = ?", [name])
    cursor.execute("DELETE FROM base.probe_skips WHERE probe = ?", [name])


def rename_probe(cursor: Cursor, name: str, new: str) -> None:
    """Give a probe, trained or not yet, another name; its rankings are computed anew when asked for.

    Its versions count on from those that the new name has had.

    Raises:
        ConceptError: there is no such probe, or one of the new name.
    """
    known = label_counts(cursor)["probe"].tolist()
    if name not in known:
        raise ConceptError(f"probe {name!r}: there is none of this name")
    if new in known:
        raise ConceptError(f"probe {new!r} is there already; choose another name, or delete that one first")
    before = _trainings(cursor, new)
    cursor.execute(
        """INSERT INTO base.probe_trainings SELECT $2, version + $3, direction FROM base.probe_trainings t
           WHERE name = $1 AND version IN (SELECT version FROM base.probes WHERE name = $1
                                           UNION ALL SELECT version FROM base.probe_versions WHERE name = $1)""",
        [name, new, before],
    )
    for table in ("probes", "probe_versions"):
        cursor.execute(
            f"UPDATE base.{table} SET name = $2, version = version + $3 WHERE name = $1", [name, new, before]
        )
    for table in ("probe_examples", "probe_skips"):
        cursor.execute(f"UPDATE base.{table} SET probe = ? WHERE probe = ?", [new, name])


def probe_versions(cursor: Cursor, name: str) -> list[SavedProbe]:
    """Earlier trainings of a probe, the latest first."""
    found = cursor.execute(
        """SELECT name, version, layer, fit, direction, details, model_fingerprint
           FROM base.probe_versions WHERE name = ? ORDER BY version DESC""",
        [name],
    ).fetchall()
    return [_saved(row) for row in found]


def set_threshold(cursor: Cursor, name: str, threshold: float) -> None:
    """Keep, with a trained probe, the score from which on a row counts as showing the behaviour."""
    (details,) = only_row(cursor.execute("SELECT details FROM base.probes WHERE name = ?", [name]))
    kept = json.dumps({**json.loads(details), "threshold": threshold})
    cursor.execute("UPDATE base.probes SET details = ? WHERE name = ?", [kept, name])


def skip(cursor: Cursor, probe: str, content_hashes: Sequence[str]) -> None:
    """Offer these texts no more for labelling."""
    cursor.execute(
        "INSERT OR REPLACE INTO base.probe_skips SELECT ?, unnest(?::VARCHAR[])",
        [probe, list(dict.fromkeys(content_hashes))],
    )


def unskip(cursor: Cursor, probe: str, content_hash: str) -> None:
    """Offer a text again."""
    cursor.execute("DELETE FROM base.probe_skips WHERE probe = ? AND content_hash = ?", [probe, content_hash])


def label(cursor: Cursor, probe: str, examples: Sequence[LabelledExample]) -> None:
    """Keep labels for a probe, trained or not yet; a later label of the same text replaces the earlier."""
    last = {e.content_hash: e for e in examples}
    rows = pa.table(  # noqa: F841 - DuckDB finds it by its name
        {
            "content_hash": pa.array(list(last), pa.string()),
            "messages": pa.array([messages_json(e.messages) for e in last.values()], pa.string()),
            "label": pa.array([e.label for e in last.values()], pa.int8()),
        }
    )
    cursor.execute(
        "INSERT OR REPLACE INTO base.probe_examples SELECT ?, content_hash, messages, label, ?::TIMESTAMP FROM rows",
        [probe, _now()],
    )


def unlabel(cursor: Cursor, probe: str, content_hashes: Sequence[str] | None = None) -> None:
    """Forget labels of a probe: of these texts, or all."""
    if content_hashes is None:
        cursor.execute("DELETE FROM base.probe_examples WHERE probe = ?", [probe])
    else:
        cursor.execute(
            "DELETE FROM base.probe_examples WHERE probe = ? AND list_contains(?::VARCHAR[], content_hash)",
            [probe, list(content_hashes)],
        )


def labels(cursor: Cursor, probe: str) -> list[LabelledExample]:
    """The labelled examples of a probe, in the order in which they were labelled."""
    found = cursor.execute(
        """SELECT messages, label FROM base.probe_examples WHERE probe = ?
           ORDER BY labelled_at, content_hash""",
        [probe],
    ).fetchall()
    return [LabelledExample(messages_from_json(messages), int(value)) for messages, value in found]


def label_counts(cursor: Cursor) -> pd.DataFrame:
    """Probes with labels: probe, positives, negatives, skipped, trained."""
    return cursor.execute(
        """SELECT coalesce(x.probe, p.name) AS probe, coalesce(x.positives, 0) AS positives,
                  coalesce(x.negatives, 0) AS negatives,
                  (SELECT count(*) FROM base.probe_skips k WHERE k.probe = coalesce(x.probe, p.name)) AS skipped,
                  p.name IS NOT NULL AS trained
           FROM (SELECT probe, count(*) FILTER (label = 1) AS positives, count(*) FILTER (label = 0) AS negatives
                 FROM base.probe_examples GROUP BY probe) x
           FULL JOIN base.probes p ON p.name = x.probe ORDER BY 1"""
    ).df()


def save_view(cursor: Cursor, name: str, page: str, query: str, by: str) -> None:
    """Keep a view under a name: a page's path and its query string. An earlier one of that name goes."""
    cursor.execute("INSERT OR REPLACE INTO base.saved_views VALUES (?, ?, ?, ?, ?)", [name, page, query, by, _now()])


def saved_views(cursor: Cursor) -> pd.DataFrame:
    """Views that have a name: name, page, query, saved_by, saved_at."""
    return cursor.execute("SELECT name, page, query, saved_by, saved_at FROM base.saved_views ORDER BY name").df()


def delete_view(cursor: Cursor, name: str) -> None:
    """Forget a named view."""
    cursor.execute("DELETE FROM base.saved_views WHERE name = ?", [name])


def label_feature(cursor: Cursor, feature: int, label: str | None, by: str) -> None:
    """Give an SAE feature a label of one's own; None takes it off, and the automatic one shows again."""
    (sae,) = only_row(cursor.execute("SELECT value FROM audit.base.meta WHERE key = 'sae'"))
    if label is None:
        cursor.execute("DELETE FROM base.feature_labels WHERE sae = ? AND feature_id = ?", [sae, feature])
    else:
        cursor.execute(
            "INSERT OR REPLACE INTO base.feature_labels VALUES (?, ?, ?, ?, ?)", [sae, feature, label, by, _now()]
        )


def _trainings(cursor: Cursor, name: str) -> int:
    """The last version that a name has had; 0 if it has had none."""
    found = cursor.execute("SELECT coalesce(max(version), 0) FROM base.probe_trainings WHERE name = ?", [name])
    return only_row(found)[0]


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
