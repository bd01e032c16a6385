"""Rows of what the `datasets` library keeps: saved directories, and the Hugging Face hub.

`datasets` takes seconds to import, and most audits read a file: it is imported where used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from concept_audit.data.formats import Row, quoted
from concept_audit.errors import DataError, first_line


def saved_split(directory: Path, split: str) -> Path:
    """Where one split lies in what `save_to_disk` wrote; a data set without splits is its own.

    Raises:
        DataError: the directory holds no data set, or no such split.
    """
    if (directory / "state.json").is_file():
        return directory
    splits = sorted(state.parent.name for state in directory.glob("*/state.json"))
    if not splits:
        raise DataError(f"{directory}: not a data set (no state.json from `save_to_disk`); name a file in it")
    if split not in splits:
        raise DataError(f"{directory}: no split {quoted([split])}; use one of {quoted(splits)}")
    return directory / split


def saved_rows(directory: Path, split: str) -> Iterator[Row]:
    """The rows of one split of a saved data set; DataError if they cannot be loaded."""
    import datasets

    where = saved_split(directory, split)
    try:
        # A data set may have been saved with a format (torch, numpy): plain values are wanted.
        data = datasets.load_from_disk(str(where)).with_format(None)
        yield from _numbered(data, directory.resolve().name)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory}: incomplete or corrupt data set ({first_line(error)}); save it again") from error


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Stream one split of a hub data set; DataError if it is unknown or out of reach."""
    import datasets

    try:
        yield from _numbered(datasets.load_dataset(name, split=split, streaming=True), name)
    except Exception as error:  # the hub's clients raise dozens of types
        raise _hub_error(name, error) from error


def hub_revision(name: str) -> str:
    """What `datasets` tells a hub data set's revisions apart by; DataError as `hub_rows`."""
    import datasets

    try:
        return str(datasets.load_dataset_builder(name).hash)
    except Exception as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError | ValueError):
        problem = "neither a file nor a readable data set on the hub; check the name and the split"
    else:
        problem = "no file, and the hub cannot be reached; go online, or name a file that exists"
    return DataError(f"{name}: {problem} ({first_line(error)})")


def _numbered(data: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    for number, values in enumerate(data, start=1):
        yield Row(values, name, "row", number)
