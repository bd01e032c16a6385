"""Which rows a view shows: predicates that compile to SQL with parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEEP = "keep"
"""The verdict of a row that somebody has seen and found nothing wrong with: it counts as not flagged."""
PLACES = ("prompt", "response")
NUMBER = "TRY_CAST(json_extract_string(e.metadata, ?) AS DOUBLE)"
"""A metadata field's value as a number; the parameter is the pointer to it."""
TERM = re.compile(r'"([^"]+)"|([^\s"]+)')


@dataclass(frozen=True)
class RowFilter:
    """Conditions that a row must all meet. The default lets every row through.

    Attributes:
        text: words that all occur in the prompt or the response, whatever their case and order;
            what stands in double quotes occurs as it is.
        text_in: where the words of `text` have to occur: all in the prompt, all in the response, or each in either.
        metadata: field → the values of it to keep, as text.
        without: field → the values of it to leave out, as text; a row that has no such field passes.
        ranges: field → its least and largest value, both included; a row whose value is no number does not pass.
        flag: rows with any flag but `KEEP`, with none or `KEEP`, without any verdict (``unseen``), or with the flag of
            this name.
        without_flags: only rows that have none of these flags.
        scores: lowest and highest score, both included; for ranked rows only.
        percentile: least percentile of the score, 0 to 100; for ranked rows only.
        example_ids: only these rows.
        sources: files or data sets that rows were read from; empty for all.
        without_sources: those that rows were not read from.
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
    text_in: Literal["", "prompt", "response"] = ""
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    without_sources: tuple[str, ...] = ()

    @property
    def needs_flags(self) -> bool:
        """Whether a row's flag decides."""
        return bool(self.flag or self.without_flags)

    @property
    def needs_rows(self) -> bool:
        """Whether a row's own columns decide, and not its score, its number and its flag alone."""
        text = self.text if self.found is None else ""
        by_metadata = any(self.metadata.values()) or any(self.without.values()) or self.ranges
        by_source = self.sources or self.without_sources
        return bool(text or by_metadata or by_source or self.tokens)

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
            places = [self.text_in] if self.text_in in PLACES else PLACES
            conditions.append(f"({' OR '.join(f'contains(lower(e.{place}), ?)' for place in places)})")
            parameters += [word] * len(places)
        for name, values in self.metadata.items():
            if values:
                conditions.append("list_contains(?::VARCHAR[], json_extract_string(e.metadata, ?))")
                parameters += [list(values), json_pointer(name)]
        for name, values in self.without.items():
            if values:
                # The list holds no NULL: of a row without the field this is NULL, which is not to leave it out.
                conditions.append("coalesce(NOT list_contains(?::VARCHAR[], json_extract_string(e.metadata, ?)), true)")
                parameters += [list(values), json_pointer(name)]
        for name, (low, high) in self.ranges.items():
            conditions.append(f"coalesce({NUMBER} BETWEEN ? AND ?, false)")
            parameters += [json_pointer(name), float(low), float(high)]
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
        if self.without_sources:
            conditions.append("NOT list_contains(?::VARCHAR[], e.source)")
            parameters.append(list(self.without_sources))
        if self.tokens is not None:
            conditions.append("e.n_tokens BETWEEN ? AND ?")
            parameters += [int(bound) for bound in self.tokens]
        return " AND ".join(conditions) or "true", parameters


def json_pointer(name: str) -> str:
    """The JSON pointer to a top-level key, whatever characters it has (RFC 6901)."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
