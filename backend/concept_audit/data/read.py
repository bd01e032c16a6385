"""Training data and labelled examples, one row at a time, from files, `datasets` or the hub.

A row is a conversation and metadata. Conversations come as turns (``messages``), as a prompt
and a response, or as plain text, which becomes a single assistant turn: the whole of it is
what training sees. Turns, duplicates and their order are kept as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from concept_audit.data.conversation import BY_NAME, Columns, Layout, TurnChoice, find_layout
from concept_audit.data.documents import Split, check_names, windows
from concept_audit.data.formats import Row, file_rows, locate, unreadable
from concept_audit.data.hub import hub_revision, hub_rows, saved_rows, saved_split
from concept_audit.data.rollouts import ALIKE, RewardColumns, check_weight, find_lists, find_rollouts, unrolled
from concept_audit.errors import AuditError, DataError
from concept_audit.types import Example, LabelledExample, Rollouts, SkippedRow

__all__ = [
    "Columns",
    "DataSet",
    "fingerprint",
    "open_data",
    "read_examples",
    "read_labelled",
    "read_prompts",
    "read_queries",
]


Skip = Callable[[SkippedRow], None]


@dataclass(frozen=True)
class DataSet:
    """A data set whose first row has told where its conversations lie.

    Attributes:
        source, split: of `open_data`.
        layout: where they lie.
        columns: of the first row that can be read.
        rollouts: what says how much rows weigh; None where all weigh alike.
    """

    source: str | Path
    split: str
    layout: Layout
    columns: tuple[str, ...]
    rollouts: Rollouts | None = None

    def examples(
        self, skip: Skip | None = None, check: Callable[[Example], None] | None = None, split: Split | None = None
    ) -> Iterator[Example]:
        """The rows as they are asked for; memory does not grow with their number.

        Args:
            skip: is told of each row that cannot be used; None to stop at the first.
            check: raises an AuditError for a row that cannot be used for what follows.
            split: where to split a row's text, if rows are plain text: each part is a row of its own.

        Raises:
            DataError: from the iterator, for a row that cannot be read, or the rest of a source that is damaged.
        """
        rows = _rows(self.source, self.split)
        lists = self.rollouts and self.rollouts.lists
        if lists:
            rows = (one for row in rows for one in unrolled(row, lists))
        for place, row in enumerate(rows):
            try:
                example = _example(row, self.layout)
                if self.rollouts is not None:
                    check_weight(self.rollouts, example.metadata, row.place)
                if check is not None:
                    check(example)
            except AuditError as error:
                if skip is None:
                    raise
                skip(SkippedRow(place, row.source, row.number, str(error)))
            else:
                yield from [example] if split is None else windows(example, place, split)


def open_data(
    source: str | Path,
    *,
    columns: Columns = BY_NAME,
    split: str = "train",
    turns: TurnChoice = "mask",
    skipping: bool = False,
    rewards: RewardColumns = ALIKE,
    splitting: bool = False,
) -> DataSet:
    """Find out where a data set's conversations lie, and what says how much they weigh.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, gzipped or not; Parquet), a directory that
            `save_to_disk` wrote, or a data set's name on the Hugging Face hub. A `Path` is
            never a hub name.
        columns: where the conversation lies; what is not named is found by name.
        split: which split of a directory or hub data set; files have none.
        turns: which assistant turns count.
        skipping: pass over first rows that cannot be read.
        rewards: whether rows are rollouts, and what they weigh by.
        splitting: rows of plain text will be split.

    Raises:
        DataError: the source is missing, empty, of no known format or without a conversation in its columns; there
            are no rewards where they are asked for; or rollouts, or rows with the columns that splitting adds, are
            to be split.
    """
    rows = _rows(source, split)
    first = next((row for row in rows if not (skipping and row.problem)), None)
    if first is None:
        raise DataError(f"{source}: no rows in it; add some, or name another file or split")
    lists = find_lists(first, columns, rewards)
    try:
        layout = _layout(first, columns, turns)
        lists = None  # it can be read as one conversation
    except DataError:
        if lists is None:
            raise
        each = (one for row in chain([first], rows) for one in unrolled(row, lists))
        usable = next((one for one in each if not (skipping and one.problem)), None)
        if usable is None:
            raise DataError(f"{source}: no rollouts in it that can be used; mend the rows") from None
        first, layout = usable, _layout(usable, columns, turns)
    rollouts = find_rollouts(first, layout, rewards, lists)
    if splitting and layout.document:
        check_names(first, rollouts is not None)
    return DataSet(source, split, layout, tuple(first.values), rollouts)


def read_examples(source: str | Path, *, columns: Columns = BY_NAME, split: str = "train") -> Iterator[Example]:
    """Read a data set's rows as they are asked for; memory does not grow with their number.

    Args:
        source, columns, split: of `open_data`.

    Raises:
        DataError: from the call itself as `open_data`; from the iterator for a row that cannot be read.
    """
    return open_data(source, columns=columns, split=split).examples()


def raw_rows(source: str | Path, split: str = "train") -> Iterator[Mapping[str, Any]]:
    """All rows of a data set with their columns as they are, in order; of one that cannot be read, none.

    Values are in JSON's types.

    Raises:
        DataError: the source is damaged.
    """
    for row in _rows(source, split):
        yield {name: _as_json(value) for name, value in row.values.items()}


def read_labelled(path: str | Path) -> list[LabelledExample]:
    """Read the examples of a probe: rows like those of `read_examples`, each with a ``label``.

    Raises:
        DataError: as `read_examples`, or a label is absent or neither 0, 1, true nor false.
    """
    layout, rows = _open(Path(path), BY_NAME, "train")
    return [LabelledExample(layout.messages(row), _label(row)) for row in rows]


def read_queries(path: str | Path) -> list[LabelledExample]:
    """Read query examples: rows like those of `read_labelled`, in which a missing label is 1.

    Raises:
        DataError: as `read_labelled`.
    """
    layout, rows = _open(Path(path), BY_NAME, "train")
    return [LabelledExample(layout.messages(row), _label(row, 1)) for row in rows]


def read_prompts(path: str | Path) -> list[LabelledExample]:
    """As `read_queries`, but for the last answer of each row, which it need not have.

    Raises:
        DataError: as `read_queries`, or a row has nothing before its answer.
    """
    layout, rows = _open(Path(path), BY_NAME, "train")
    return [LabelledExample(layout.prompt(row), _label(row, 1)) for row in rows]


def fingerprint(source: str | Path, split: str = "train") -> str:
    """Tell whether data have changed: 16 hexadecimal digits over their bytes.

    For a hub name, over the name, the split and the `datasets` hash of its present revision,
    which takes a request to the hub.

    Raises:
        DataError: the data are missing, or the hub cannot be reached.
    """
    path = locate(source)
    if path is None:
        parts = [part.encode() for part in (str(source), split, hub_revision(str(source)))]
    elif path.is_dir():
        tables = sorted(saved_split(path, split).glob("*.arrow"))
        # Caches of `map` and `filter` lie beside the data and come and go.
        parts = [_digest(table) for table in tables if not table.name.startswith("cache-")]
    else:
        parts = [_digest(path)]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _open(source: str | Path, columns: Columns, split: str) -> tuple[Layout, Iterator[Row]]:
    """The layout that the first row shows, and all rows, the first included."""
    rows = _rows(source, split)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: no rows in it; add some, or name another file or split")
    return _layout(first, columns), chain([first], rows)


def _layout(first: Row, columns: Columns, turns: TurnChoice = "mask") -> Layout:
    if first.problem:
        raise DataError(first.problem)
    return find_layout(first, columns, turns)


def _rows(source: str | Path, split: str) -> Iterator[Row]:
    path = locate(source)
    if path is None:
        return hub_rows(str(source), split)
    return saved_rows(path, split) if path.is_dir() else file_rows(path)


def _example(row: Row, layout: Layout) -> Example:
    messages = layout.messages(row)
    rest = {name: value for name, value in row.values.items() if name not in layout.columns}
    try:
        metadata = _as_json(rest)
    except RecursionError:
        raise DataError(f"{row.place}: metadata nested too deeply; flatten them") from None
    return Example(messages, row.source, row.number, metadata)


def _label(row: Row, default: int | None = None) -> int:
    label = row.values.get("label", default)
    if label not in (0, 1):
        shown = f"{label!r} is not a label" if "label" in row.values else "no label"
        raise DataError(f'{row.place}: "label": {shown}; write 0, 1, true or false')
    return int(label)


def _as_json(value: Any) -> Any:
    """A value that Parquet, `datasets` or JSON gave, in JSON's types; NaN and infinity are null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() | Decimal():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): _as_json(item) for key, item in value.items()}
        case list() | tuple() | set():
            return [_as_json(item) for item in value]
        case np.ndarray() | np.generic():
            return _as_json(value.tolist())
        case bytes():
            return value.decode("utf-8", "backslashreplace")
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case _:
            return str(value)


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as error:
        raise unreadable(path, error) from error
