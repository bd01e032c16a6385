"""Tables as pages read them."""

from __future__ import annotations

from typing import Any

import pandas as pd

NOTHING = "–"
"""Stands in a table where there is no figure."""


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, each by the names of its columns."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
