"""A connection that asks DuckDB, and what is asked of every answer."""

from __future__ import annotations

from typing import Any

import duckdb

Cursor = duckdb.DuckDBPyConnection


def only_row(cursor: Cursor) -> tuple[Any, ...]:
    """The row of a query that always has one: an aggregate, or a value that every store keeps."""
    row = cursor.fetchone()
    assert row is not None, "this query always has a row"
    return row
