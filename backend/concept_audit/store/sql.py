"""A person's own query on an audit: one statement, which reads."""

from __future__ import annotations

import duckdb
import pandas as pd

from concept_audit.errors import StoreError, first_line
from concept_audit.store.database import Cursor


def run_query(cursor: Cursor, query: str) -> pd.DataFrame:
    """What one SELECT finds; the contract views are in its search path.

    Args:
        cursor: of a lease for reading, so neither database can be written to.

    Raises:
        StoreError: not one SELECT, or DuckDB refuses it; its words are told.
    """
    try:
        statements = duckdb.extract_statements(query)
    except duckdb.Error as error:
        raise StoreError(f"the query cannot be read: {first_line(error)}") from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise StoreError("the query has to be one SELECT: an audit is looked at here, and not changed")
    try:
        return cursor.execute(statements[0]).df()
    except duckdb.Error as error:
        raise StoreError(f"the query was refused: {first_line(error)}") from error
