"""Which rows a view shows: predicates that compile to SQL with parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEEP = "keep"
"""The verdict of a row that somebody has seen and found nothing wrong with: it counts as not flagged."""
TERM = re.compile(r'"([^"]+)"|([^\s"]+)')


@dataclass(frozen=True)
class RowFilter:
    """Conditions that a row must all meet. The default lets every row through.

    Attributes:
        text: words that all occur in the prompt or the response, whatever their case and order;
            what stands in double quotes occurs as it is.
        metadata: field → the values of it to keep, as text.
        flag: rows with any flag but `KEEP`, with none or `KEEP`, without any verdict (``unseen``), or with the flag of
            this name.
        without_flags: only rows that have none of these flags.
        scores: lowest and highest score, both included; for ranked rows only.
        percentile: least percentile of the score, 0 to 100; for ranked rows only.
        example_ids: only these rows.
        sources: files or data sets that rows were read from; empty for all.
        tokens: least and most tokens of the row, both included.
        found: the table with the ids of the rows that have the words of `text`, where it has been searched
            for already (`Database.found`).
    """

    text: str = ""
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flag: Literal["", "any", "none", "unseen"] | str = ""
    scores: tuple[float, float] | None = None
    percentile: float | None = None
    example_ids: tuple[int, ...] | None = None
    sources: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None
    found: str | None = None
    without_flags: tuple[str, ...] = ()

    @property
    def needs_flags(self) -> bool:
        """Whether a row's flag decides."""
        return bool(self.flag or self.without_flags)

    @property
    def needs_rows(self) -> bool:
        """Whether a row's own columns or its flag decide, and not its score and its number alone."""
        text = self.text if self.found is None else ""
        return bool(text or any(self.metadata.values()) or self.needs_flags or self.sources or self.tokens)

    def words(self) -> list[str]:
        """What has to occur, in lower case: single words, and whole phrases that stand in quotes."""
        return [(phrase or word).lower() for phrase, word in TERM.findall(self.text) if phrase or word]

    def sql(self, row: str = "e.example_id") -> tuple[str, list[Any]]:
        """A condition on ``e`` (examples), ``f`` (flags) and, for scores, ``s``; and its parameters.

        Args:
            row: the column with the number of the row.
        """
        conditions: list[str] = []
        parameters: list[Any] = []
        if self.found is not None:
            conditions.append(f"{row} IN (SELECT example_id FROM {self.found})")
        for word in self.words() if self.found is None else ():
            conditions.append("(contains(lower(e.prompt), ?) OR contains(lower(e.response), ?))")
            parameters += [word, word]
        for name, values in self.metadata.items():
            if values:
                conditions.append("list_contains(?::VARCHAR[], json_extract_string(e.metadata, ?))")
                parameters += [list(values), json_pointer(name)]
        if self.flag == "any":
            conditions.append("f.flag <> ?")
            parameters.append(KEEP)
        elif self.flag == "none":
            conditions.append("coalesce(f.flag, ?) = ?")
            parameters += [KEEP, KEEP]
        elif self.flag == "unseen":
            conditions.append("f.flag IS NULL")
        elif self.flag:
            conditions.append("f.flag = ?")
            parameters.append(self.flag)
        if self.without_flags:
            conditions.append("(f.flag IS NULL OR NOT list_contains(?::VARCHAR[], f.flag))")
            parameters.append(list(self.without_flags))
        if self.scores is not None:
            conditions.append("s.score BETWEEN ? AND ?")
            parameters += [float(bound) for bound in self.scores]
        if self.percentile is not None:
            conditions.append("s.percentile >= ?")
            parameters.append(float(self.percentile))
        if self.example_ids is not None:
            conditions.append(f"list_contains(?::BIGINT[], {row})")
            parameters.append(list(self.example_ids))
        if self.sources:
            conditions.append("list_contains(?::VARCHAR[], e.source)")
            parameters.append(list(self.sources))
        if self.tokens is not None:
            conditions.append("e.n_tokens BETWEEN ? AND ?")
            parameters += [int(bound) for bound in self.tokens]
        return " AND ".join(conditions) or "true", parameters


def json_pointer(name: str) -> str:
    """The JSON pointer to a top-level key, whatever characters it has (RFC 6901)."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
