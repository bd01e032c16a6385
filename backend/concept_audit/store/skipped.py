"""Rows of the data that a build left out, and why."""

from __future__ import annotations

import pandas as pd

from concept_audit.store.cursor import Cursor, only_row

COLUMNS = "place, source, source_row, reason"


def skipped_rows(cursor: Cursor, limit: int | None = None) -> pd.DataFrame:
    """In the order of the data.

    Returns:
        place (the row's number among all rows of the data, from 0), source, source_row, reason.
    """
    # Audits made before rows could be left out have no such table, and have left none out.
    there = only_row(
        cursor.execute(
            """SELECT count(*) FROM duckdb_tables()
               WHERE database_name = 'audit' AND schema_name = 'base' AND table_name = 'skipped_rows'"""
        )
    )[0]
    if not there:
        return pd.DataFrame(columns=COLUMNS.split(", "))
    return cursor.execute(f"SELECT {COLUMNS} FROM audit.base.skipped_rows ORDER BY place LIMIT ?", [limit]).df()
