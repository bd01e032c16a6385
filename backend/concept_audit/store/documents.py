"""Documents that were split into windows: where each row lies in its document, and the documents by a ranking.

A document D of windows w has the score

    s(D) = Σ_w n_w s(w) / Σ_w n_w,

over its windows that have a score. Of a score that is a mean over tokens, with n_w how many it is a mean over, this is
the mean over all tokens of the document. The loss is such a mean, over the tokens that are predicted:
L(D) = Σ_w n_w L(w) / Σ_w n_w with n_w the predicted tokens of w, and ∇L(D) is the same mean of ∇L(w). The influence of
a row is linear in its gradient, so that of D is the mean of its windows'. What is no mean over tokens (cosine, shared
words) is averaged by response tokens, and is not what the document as one text would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd

from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import KEEP
from concept_audit.store.rankings import scores_table
from concept_audit.types import DOCUMENT_NUMBER, WINDOW_NUMBER, Window

WINDOWS = "audit.base.windows"
Weight = Literal["response", "content", "predicted"]
"""The tokens that a window counts by: of its response; of these its text alone; or those that the loss is a mean over."""
Order = Literal["mean", "strongest"]
"""Documents by their own score, or by that of their strongest window."""
_TOKENS: Mapping[Weight, str] = {
    "response": "e.n_response_tokens",
    "content": "w.n_content",
    "predicted": "w.n_predicted",
}


def insert_windows(con: Cursor, rows: str, tokens: str) -> None:
    """Fill ``base.windows`` from a shard of rows and one of their tokens, both Parquet files."""
    con.execute(
        """INSERT INTO base.windows
           SELECT example_id, document, number, "of", start, "end",
                  n_response_tokens - coalesce(parts[1] <> 0, false)::INTEGER,
                  len(list_filter(parts, lambda p: p = 2))
           FROM read_parquet(?) r JOIN read_parquet(?) t USING (example_id) ORDER BY example_id""",
        [rows, tokens],
    )


def with_numbers() -> str:
    """What a query of a shard of rows selects for their metadata, with what splitting adds to those of windows."""
    # JSON text, so that all that was there stays as it was.
    before = "CASE WHEN metadata = '{}' THEN '{' ELSE left(metadata, length(metadata) - 1) || ', ' END"
    added = f"""'"{DOCUMENT_NUMBER}": ' || document || ', "{WINDOW_NUMBER}": ' || number || '}}'"""
    return f"""CASE WHEN "of" = 1 THEN metadata ELSE {before} || {added} END"""


def documents(cursor: Cursor, ranking: int, weight: Weight, order: Order, limit: int | None = None) -> pd.DataFrame:
    """Documents by a ranking of their windows.

    Returns:
        rank, document (its number), score, windows (how many it has), strongest_window (its number),
        strongest_example_id, strongest_score, flagged (how many of the windows have a flag other than keep), exact
        (whether all scores are no approximation), source, source_row.
    """
    by = {"mean": "score", "strongest": "strongest_score"}[order]
    return cursor.execute(
        f"""WITH found AS MATERIALIZED (
                SELECT w.document, any_value(w.n_windows) AS windows,
                       sum(s.score * {_TOKENS[weight]}) / sum({_TOKENS[weight]}) AS score,
                       arg_min(w.window_number, s.rank) AS strongest_window,
                       arg_min(s.example_id, s.rank) AS strongest_example_id, max(s.score) AS strongest_score,
                       count(*) FILTER (f.flag <> ?) AS flagged, bool_and(s.exact) AS exact
                FROM {scores_table(cursor, ranking)} s JOIN {WINDOWS} w ON w.example_id = s.example_id
                JOIN main.examples e ON e.example_id = s.example_id
                LEFT JOIN base.flags f ON f.content_hash = e.content_hash
                WHERE s.ranking_id = ? GROUP BY w.document),
            placed AS (
                SELECT row_number() OVER (ORDER BY {by} DESC, document) AS rank, * FROM found
                WHERE score IS NOT NULL ORDER BY rank LIMIT ?)
            SELECT rank, document, score, windows, strongest_window, strongest_example_id, strongest_score, flagged,
                   exact, e.source, e.source_row
            FROM placed JOIN main.examples e ON e.example_id = strongest_example_id ORDER BY rank""",
        [KEEP, ranking, limit],
    ).df()


def windows_of(cursor: Cursor, numbers: Sequence[int]) -> list[int]:
    """The ids of all windows of documents, in the order of the data."""
    found = cursor.execute(
        f"SELECT example_id FROM {WINDOWS} WHERE document IN (SELECT unnest(?::BIGINT[])) ORDER BY example_id",
        [[int(number) for number in numbers]],
    ).fetchall()
    return [example_id for (example_id,) in found]


def unknown(cursor: Cursor, numbers: Sequence[int]) -> list[int]:
    """Those numbers that no document of the audit has."""
    found = cursor.execute(
        f"""SELECT DISTINCT number FROM (SELECT unnest(?::BIGINT[]) AS number)
            WHERE number NOT IN (SELECT document FROM {WINDOWS}) ORDER BY number""",
        [[int(number) for number in numbers]],
    ).fetchall()
    return [number for (number,) in found]


def places_in_documents(cursor: Cursor, example_ids: Sequence[int]) -> dict[int, Window]:
    """Where rows lie in their documents, by example id."""
    found = cursor.execute(
        f"""SELECT example_id, document, window_number, n_windows, first_character, end_character FROM {WINDOWS}
            WHERE example_id IN (SELECT unnest(?::BIGINT[]))""",
        [[int(i) for i in example_ids]],
    ).fetchall()
    return {example_id: Window(*place) for example_id, *place in found}


def number_of(cursor: Cursor, example_ids: Sequence[int]) -> int:
    """How many documents rows are parts of."""
    found = cursor.execute(
        f"SELECT count(DISTINCT document) FROM {WINDOWS} WHERE example_id IN (SELECT unnest(?::BIGINT[]))",
        [[int(i) for i in example_ids]],
    )
    return int(only_row(found)[0])


def all_places(cursor: Cursor) -> pd.DataFrame:
    """Where every row lies in its document: document, of, start, end, in the order of example ids, from 0."""
    return cursor.execute(
        f"""SELECT document, n_windows AS of, first_character AS start, end_character AS "end"
            FROM {WINDOWS} ORDER BY example_id"""
    ).df()


def counts(cursor: Cursor, table: str = WINDOWS) -> dict[str, int]:
    """How many documents were split, and into how many windows."""
    found = only_row(
        cursor.execute(f"SELECT count(*) FILTER (window_number = 1), count(*) FROM {table} WHERE n_windows > 1")
    )
    return dict(zip(("documents", "windows"), map(int, found), strict=True))
