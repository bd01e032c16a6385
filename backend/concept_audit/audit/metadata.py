"""What a row's metadata say: kept as JSON text in the store, shown and taken away as columns."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd


def decoded_metadata(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The metadata of each row of a frame, as dictionaries."""
    return [json.loads(text) for text in frame["metadata"]]


def with_metadata(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The named columns, then a column for each metadata field.

    A field that has the name of a column is called ``metadata.NAME``.
    """
    metadata = decoded_metadata(frame)
    fields = dict.fromkeys(name for row in metadata for name in row)
    taken = set(columns)
    added = {
        f"metadata.{name}" if name in taken else name: pd.Series([row.get(name) for row in metadata], dtype=object)
        for name in fields
    }
    return pd.concat([frame[columns].reset_index(drop=True), pd.DataFrame(added)], axis=1)
