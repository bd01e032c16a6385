"""Labels of a probe for many rows at once, and taking them back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from concept_audit.store.cursor import Cursor
from concept_audit.store.filters import RowFilter
from concept_audit.store.flags import choose_matching


@dataclass(frozen=True)
class LabelChange:
    """What came of labelling many rows.

    Attributes:
        before: content hash → the label that the text had, None for none; of the texts whose label has changed.
    """

    probe: str
    label: int
    before: dict[str, int | None]


def label_matching(
    cursor: Cursor, ranking: int | None, where: RowFilter, probe: str, label: int, top: int | None = None
) -> LabelChange:
    """Give every row that passes a filter, or the first `top` of them, a label of a probe, trained or not yet.

    Raises:
        RankingGoneError: the ranking is not there any more.
    """
    choose_matching(cursor, ranking, where, top)
    cursor.execute(
        """CREATE OR REPLACE TEMP TABLE labelled AS
           SELECT c.content_hash, x.label AS before FROM temp.chosen c
           LEFT JOIN (SELECT * FROM base.probe_examples WHERE probe = ?) x USING (content_hash)
           WHERE x.label IS DISTINCT FROM ?""",
        [probe, label],
    )
    before = dict(cursor.execute("SELECT content_hash, before FROM temp.labelled ORDER BY content_hash").fetchall())
    cursor.execute(
        """INSERT OR REPLACE INTO base.probe_examples
           SELECT $1, content_hash, any_value(messages), $2::TINYINT, $3::TIMESTAMP
           FROM main.examples WHERE content_hash IN (SELECT content_hash FROM temp.labelled) GROUP BY content_hash""",
        [probe, label, datetime.now(UTC).replace(tzinfo=None)],
    )
    return LabelChange(probe, label, before)


def undo_labels(cursor: Cursor, change: LabelChange) -> int:
    """Put back the labels from before a change; texts that have been labelled otherwise since keep what they have.

    Returns:
        how many texts have changed.
    """
    undone = 0
    for value in sorted({*change.before.values()}, key=str):
        texts = [text for text, before in change.before.items() if before == value]
        now = "probe = ? AND label = ? AND content_hash IN (SELECT unnest(?::VARCHAR[]))"
        asked = [change.probe, change.label, texts]
        if value is None:
            gone = cursor.execute(f"DELETE FROM base.probe_examples WHERE {now} RETURNING 1", asked)
        else:
            gone = cursor.execute(f"UPDATE base.probe_examples SET label = ? WHERE {now} RETURNING 1", [value, *asked])
        undone += len(gone.fetchall())
    return undone
