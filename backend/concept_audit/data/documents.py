"""Documents, which are rows of plain text, as rows of their own: their windows, which remember where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from concept_audit.data.formats import Row
from concept_audit.errors import DataError
from concept_audit.types import DOCUMENT_NUMBER, WINDOW_NUMBER, Example, Window

Split = Callable[[str], Sequence[tuple[int, int]]]
"""A text → the first character of each part, and the first behind it; one after the other they are the text."""


def windows(example: Example, document: int, split: Split) -> list[Example]:
    """The parts of a document, each a row that stands where the document stands, with its metadata.

    Args:
        example: a row of plain text, so with a single turn.
        document: its number among the rows of the data.
    """
    (turn,) = example.messages
    spans = split(turn.content)
    return [
        replace(
            example,
            messages=(replace(turn, content=turn.content[start:end]),),
            window=Window(document, number, len(spans), start, end),
        )
        for number, (start, end) in enumerate(spans, start=1)
    ]


def check_names(row: Row, weighed: bool) -> None:
    """Raise DataError for documents that cannot be split.

    Args:
        row: the first one.
        weighed: whether rows are rollouts.
    """
    if weighed:
        raise DataError(
            f"{row.source}: rollouts are not split, since each is one response with one reward; leave "
            "--long-documents split out, or --rollouts and its columns"
        )
    for name in (DOCUMENT_NUMBER, WINDOW_NUMBER):
        if name in row.values:
            raise DataError(
                f'{row.place}: the column "{name}" has the name of what splitting adds, as the export of an audit has '
                "it; rename it, or leave --long-documents split out"
            )
