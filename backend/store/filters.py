"""Which rows a view shows: predicates that compile to SQL with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RowFilter:
    """Conditions that a row must all meet. The default lets every row through.

    Attributes:
        text: occurs in the prompt or the response, whatever its case.
        metadata: field → the values of it to keep, as text.
        flag: rows with any flag, with none, or with the flag of this name.
        scores: lowest and highest score, both included; for ranked rows only.
        example_ids: only these rows.
    """

    text: str = ""
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flag: Literal["", "any", "none"] | str = ""
    scores: tuple[float, float] | None = None
    example_ids: tuple[int, ...] | None = None

    def sql(self) -> tuple[str, list[Any]]:
        """A condition on ``e`` (examples), ``f`` (flags) and, for scores, ``s``; and its parameters."""
        conditions: list[str] = []
        parameters: list[Any] = []
        if self.text:
            conditions.append(
                "(contains(lower(e.prompt), lower(?)) OR contains(lower(e.response), lower(?)))"
            )
            parameters += [self.text, self.text]
        for name, values in self.metadata.items():
            if values:
                conditions.append("list_contains(?::VARCHAR[], json_extract_string(e.metadata, ?))")
                parameters += [list(values), json_pointer(name)]
        if self.flag == "any":
            conditions.append("f.flag IS NOT NULL")
        elif self.flag == "none":
            conditions.append("f.flag IS NULL")
        elif self.flag:
            conditions.append("f.flag = ?")
            parameters.append(self.flag)
        if self.scores is not None:
            conditions.append("s.score BETWEEN ? AND ?")
            parameters += [float(bound) for bound in self.scores]
        if self.example_ids is not None:
            conditions.append("list_contains(?::BIGINT[], e.example_id)")
            parameters.append(list(self.example_ids))
        return " AND ".join(conditions) or "true", parameters


def json_pointer(name: str) -> str:
    """The JSON pointer to a top-level key, whatever characters it has (RFC 6901)."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
