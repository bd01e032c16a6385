"""Flags on rows, and the log of who changed which: every change can be undone, and none is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from concept_audit.errors import StoreError
from concept_audit.store import queries
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.derived import require_rankings
from concept_audit.store.filters import RowFilter

STATE = "{'flag': f.flag, 'note': f.note, 'flagged_by': f.flagged_by, 'flagged_at': f.flagged_at}"


@dataclass(frozen=True)
class FlagChange:
    """What came of a change.

    Attributes:
        event_id: its place in the log; None if nothing had to change.
        n_texts: how many texts have changed.
        left_alone: for an undo, texts that somebody has changed since, and that keep what they have.
    """

    event_id: int | None
    n_texts: int
    left_alone: int = 0


def set_flags(
    cursor: Cursor, content_hashes: Sequence[str], flag: str | None, note: str | None, by: str, how: str = "one by one"
) -> FlagChange:
    """Flag texts, or take their flags off where `flag` is None; every row with that content shows it.

    Args:
        note: what the flag goes with; None leaves each text the note that it has.
        how: in words, how the rows were chosen.
    """
    _choose(cursor, "SELECT DISTINCT unnest(?::VARCHAR[]) AS content_hash", [list(content_hashes)])
    return _change(cursor, flag, note, by, how)


def flag_matching(
    cursor: Cursor,
    ranking: int | None,
    where: RowFilter,
    flag: str | None,
    note: str | None,
    by: str,
    how: str,
    top: int | None = None,
) -> FlagChange:
    """As `set_flags`, for every row that passes a filter, or the first `top` of them by rank.

    Raises:
        RankingGoneError: the ranking is not there any more.
    """
    choose_matching(cursor, ranking, where, top)
    return _change(cursor, flag, note, by, how)


def note_matching(
    cursor: Cursor, ranking: int | None, where: RowFilter, note: str, by: str, how: str, top: int | None = None
) -> FlagChange:
    """Write a note on every row that passes a filter and has a flag, whichever it is; the flags stay.

    Raises:
        RankingGoneError: the ranking is not there any more.
    """
    choose_matching(cursor, ranking, where, top)
    cursor.execute(
        f"""CREATE OR REPLACE TEMP TABLE changes AS
            SELECT f.content_hash, {STATE} AS before FROM temp.chosen JOIN base.flags f USING (content_hash)
            WHERE f.note <> ?""",
        [note],
    )
    after = "{'flag': before.flag, 'note': $1, 'flagged_by': $2, 'flagged_at': $3::TIMESTAMP}"
    now = _now()
    return _made(cursor, "note", note, by, how, now, after, [note, by, now])


def choose_matching(cursor: Cursor, ranking: int | None, where: RowFilter, top: int | None) -> None:
    """Put the content hashes of the rows that pass a filter, or of the first `top`, into the table ``temp.chosen``.

    Raises:
        RankingGoneError: the ranking is not there any more.
    """
    if ranking is not None:
        require_rankings(cursor, [ranking])
    source, condition, parameters = queries.matching(cursor, ranking, where)
    one, order = ("s.example_id", "s.rank") if ranking is not None else ("e.example_id", "e.example_id")
    chosen = f"""SELECT DISTINCT content_hash FROM main.examples WHERE example_id IN (
        SELECT {one} FROM {source} WHERE {condition} ORDER BY {order} LIMIT ?)"""
    _choose(cursor, chosen, [*parameters, top])


def _choose(cursor: Cursor, chosen: str, parameters: Sequence[Any]) -> None:
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE chosen AS {chosen}", list(parameters))


def _change(cursor: Cursor, flag: str | None, note: str | None, by: str, how: str) -> FlagChange:
    """Flag the texts of ``temp.chosen``, or take their flags off."""
    cursor.execute(
        f"""CREATE OR REPLACE TEMP TABLE changes AS
            SELECT c.content_hash, CASE WHEN f.flag IS NOT NULL THEN {STATE} END AS before
            FROM temp.chosen c LEFT JOIN base.flags f USING (content_hash)
            WHERE {"f.flag IS NOT NULL" if flag is None else "f.flag IS DISTINCT FROM $1 OR f.note <> $2::VARCHAR"}""",
        [] if flag is None else [flag, note],
    )
    now = _now()
    if flag is None:
        return _made(cursor, "unflag", note or "", by, how, now, "NULL", [])
    after = """{'flag': $1, 'note': coalesce($2::VARCHAR, before.note, ''), 'flagged_by': $3,
        'flagged_at': $4::TIMESTAMP}"""
    return _made(cursor, flag, note or "", by, how, now, after, [flag, note, by, now])


def _made(
    cursor: Cursor, name: str, note: str, by: str, how: str, now: datetime, after: str, values: Sequence[Any]
) -> FlagChange:
    """Log the changes that lie in ``temp.changes``, and make them.

    Args:
        after: what each text has then, an expression whose parameters are `values`.
    """
    event = _log(cursor, name, note, how, None, by, now)
    if event.event_id is None:
        return event
    cursor.execute(
        f"""INSERT INTO base.flag_changes
            SELECT {event.event_id}, content_hash, before, {after} FROM temp.changes""",
        list(values),
    )
    _apply(cursor, event.event_id)
    return event


def undo(cursor: Cursor, event_id: int, by: str) -> FlagChange:
    """Put the flags that a change has changed back to what they were before it.

    Texts that have been changed since keep what they have. The undoing is a change itself, and can be undone.

    Raises:
        StoreError: no such change.
    """
    found = cursor.execute("SELECT action, n_texts FROM base.flag_log WHERE event_id = ?", [event_id]).fetchone()
    if found is None:
        raise StoreError(f"flag change {event_id}: there is none of this number; see the log of changes")
    cursor.execute(
        f"""CREATE OR REPLACE TEMP TABLE changes AS
            SELECT c.content_hash, CASE WHEN f.flag IS NOT NULL THEN {STATE} END AS before, c.before AS after
            FROM base.flag_changes c LEFT JOIN base.flags f USING (content_hash)
            WHERE c.event_id = ? AND (CASE WHEN f.flag IS NOT NULL THEN {STATE} END) IS NOT DISTINCT FROM c.after""",
        [event_id],
    )
    event = _log(cursor, "undo", "", f"undoes change {event_id} ({found[0]})", event_id, by, _now())
    if event.event_id is not None:
        cursor.execute(
            f"INSERT INTO base.flag_changes SELECT {event.event_id}, content_hash, before, after FROM temp.changes"
        )
        _apply(cursor, event.event_id)
    return FlagChange(event.event_id, event.n_texts, found[1] - event.n_texts)


def flags_of(cursor: Cursor, content_hashes: Sequence[str]) -> dict[str, str]:
    """The flags of texts, by content; those without one are left out."""
    chosen = "SELECT content_hash, flag FROM base.flags WHERE list_contains(?::VARCHAR[], content_hash)"
    return dict(cursor.execute(chosen, [list(content_hashes)]).fetchall())


def verdicts(cursor: Cursor, ranking: int | None, where: RowFilter, top: int | None = None) -> dict[str | None, int]:
    """How many of the rows that pass a filter have which flag; None stands for those without any.

    Args:
        top: only the first so many of them.

    Raises:
        RankingGoneError: the ranking is not there any more.
    """
    if ranking is not None:
        require_rankings(cursor, [ranking])
    source, condition, parameters = queries.matching(cursor, ranking, where)
    one, order = ("s.example_id", "s.rank") if ranking is not None else ("e.example_id", "e.example_id")
    first, limit = ("", []) if top is None else (f"ORDER BY {order} LIMIT ?", [top])
    return dict(
        cursor.execute(
            f"""SELECT g.flag, count(*)
                FROM (SELECT {one} AS example_id FROM {source} WHERE {condition} {first}) chosen
                LEFT JOIN {queries.FLAGGED_ROWS} g USING (example_id)
                GROUP BY g.flag""",
            [*parameters, *limit],
        ).fetchall()
    )


LOG = """SELECT event_id, action, n_texts, how, note, undoes,
             event_id IN (SELECT undoes FROM base.flag_log WHERE undoes IS NOT NULL) AS undone, made_by, made_at
         FROM base.flag_log"""


def log(cursor: Cursor, limit: int) -> pd.DataFrame:
    """The latest changes, newest first: event_id, action, n_texts, how, note, undoes, undone, made_by, made_at."""
    return cursor.execute(f"{LOG} ORDER BY event_id DESC LIMIT ?", [limit]).df()


def undoable(cursor: Cursor, by: str) -> pd.DataFrame:
    """The latest change that somebody has made and not undone, as a row of `log`; empty if there is none."""
    return cursor.execute(
        f"SELECT * FROM ({LOG}) WHERE made_by = ? AND NOT undone AND undoes IS NULL ORDER BY event_id DESC LIMIT 1",
        [by],
    ).df()


def latest(cursor: Cursor) -> tuple[int, str]:
    """The number of the latest change, and who made it; 0 and nobody if there is none."""
    found = cursor.execute("SELECT event_id, made_by FROM base.flag_log ORDER BY event_id DESC LIMIT 1").fetchone()
    return found or (0, "")


def _log(cursor: Cursor, action: str, note: str, how: str, undoes: int | None, by: str, now: datetime) -> FlagChange:
    count = only_row(cursor.execute("SELECT count(*) FROM temp.changes"))[0]
    if not count:
        return FlagChange(None, 0)
    # Nobody else writes meanwhile, and no event ever goes.
    event_id = only_row(cursor.execute("SELECT coalesce(max(event_id), 0) + 1 FROM base.flag_log"))[0]
    cursor.execute(
        "INSERT INTO base.flag_log VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [event_id, action, note, count, how, undoes, by, now],
    )
    return FlagChange(event_id, count)


def _apply(cursor: Cursor, event_id: int) -> None:
    cursor.execute(
        """DELETE FROM base.flags WHERE content_hash IN (
               SELECT content_hash FROM base.flag_changes WHERE event_id = $1 AND after IS NULL)""",
        [event_id],
    )
    cursor.execute(
        """INSERT OR REPLACE INTO base.flags
           SELECT content_hash, after.flag, after.note, after.flagged_by, after.flagged_at
           FROM base.flag_changes WHERE event_id = $1 AND after IS NOT NULL""",
        [event_id],
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
