"""Facets: the values of a metadata field among the rows of a view, with how many rows have each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from concept_audit.store import queries
from concept_audit.store.cursor import Cursor
from concept_audit.store.filters import KEEP, NUMBER, RowFilter, json_pointer


def apart_from(where: RowFilter, field: str | None) -> RowFilter:
    """A filter without what it asks of one metadata field, or of the source where `field` is None."""
    if field is None:
        return replace(where, sources=(), without_sources=())
    return replace(
        where,
        metadata={name: told for name, told in where.metadata.items() if name != field},
        without={name: told for name, told in where.without.items() if name != field},
        ranges={name: told for name, told in where.ranges.items() if name != field},
    )


def values(
    cursor: Cursor,
    ranking: int | None,
    where: RowFilter,
    field: str | None,
    search: str,
    limit: int,
    always: Sequence[str] = (),
) -> pd.DataFrame:
    """The most frequent values of a field among the rows that pass a filter.

    Args:
        field: None for the source.
        search: only values in which this occurs, whatever its case.
        always: values that come first, whatever is searched for.

    Returns:
        value, n_rows, n_flagged, n_values (how many there are in all); rows that have no such field are left out.
    """
    value = "e.source" if field is None else "json_extract_string(e.metadata, ?)"
    rows, parameters = _rows(cursor, ranking, where, value, [] if field is None else [json_pointer(field)])
    return cursor.execute(
        f"""WITH counted AS (
                SELECT value, count(*) AS n_rows, count(*) FILTER (flagged) AS n_flagged FROM ({rows})
                WHERE value IS NOT NULL AND (contains(lower(value), lower(?)) OR list_contains(?::VARCHAR[], value)) GROUP BY value)
            SELECT value, n_rows, n_flagged, count(*) OVER () AS n_values FROM counted
            ORDER BY list_contains(?::VARCHAR[], value) DESC, n_rows DESC, value LIMIT ?""",
        [*parameters, search, list(always), list(always), max(limit, len(always))],
    ).df()


def numbers(cursor: Cursor, ranking: int | None, where: RowFilter, field: str, bins: int) -> pd.DataFrame:
    """A field's numbers among the rows that pass a filter, in equal bins between the least and the largest.

    Returns:
        bin (from 0), low, high (of the numbers in it), n_rows, n_flagged; empty bins are left out, and so are
        values that are no finite number.
    """
    rows, parameters = _rows(cursor, ranking, where, NUMBER, [json_pointer(field)])
    return cursor.execute(
        f"""WITH found AS MATERIALIZED (SELECT * FROM ({rows}) WHERE isfinite(value)),
                 span AS (SELECT min(value) AS least, (max(value) - min(value)) / ? AS width FROM found)
            SELECT CASE WHEN width > 0 THEN least(floor((value - least) / width)::INTEGER, ? - 1) ELSE 0 END AS bin,
                   min(value) AS low, max(value) AS high, count(*) AS n_rows, count(*) FILTER (flagged) AS n_flagged
            FROM found, span GROUP BY bin ORDER BY bin""",
        [*parameters, bins, bins],
    ).df()


def _rows(
    cursor: Cursor, ranking: int | None, where: RowFilter, value: str, pointer: list[Any]
) -> tuple[str, list[Any]]:
    """A query of a value and of whether the row is flagged, of each row that passes; and its parameters.

    Args:
        value: an expression on ``e``; its parameters are `pointer`.
    """
    source, condition, parameters = queries.matching(cursor, ranking, where)
    one = "e.example_id" if ranking is None else "s.example_id"
    query = f"""SELECT {value} AS value, coalesce(f.flag <> ?, false) AS flagged
                FROM (SELECT {one} AS example_id FROM {source} WHERE {condition}) chosen
                JOIN main.examples e USING (example_id) LEFT JOIN base.flags f USING (content_hash)"""
    return query, [*pointer, KEEP, *parameters]
