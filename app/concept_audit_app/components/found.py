"""Where a row has the words of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

BEFORE, AFTER = 16, 110
"""Characters shown about the words: few before them, so that they stand in a narrow list too."""


def phrase_found(
    row: Mapping[str, Any], words: Sequence[str], place: Literal["", "prompt", "response"] = ""
) -> dict[str, str] | None:
    """What stands about the first word of a search, and where: in the response, or else in the prompt.

    Args:
        row: with ``prompt`` and ``response``.
        words: in lower case, as from `RowFilter.words`.
        place: where they were looked for.

    Returns:
        where, before, hit, after; None where they are not in either, such as for a letter whose lower case is
        longer.
    """
    for where in (place,) if place else ("response", "prompt"):
        text = row[where]
        lowered = text.lower()
        if len(lowered) != len(text):
            continue
        for word in words:
            start = lowered.find(word)
            if start >= 0:
                end = start + len(word)
                before = text[max(0, start - BEFORE) : start]
                return {
                    "where": where,
                    "before": f"{'…' if start > BEFORE else ''}{_line(before)}",
                    "hit": _line(text[start:end]),
                    "after": _line(text[end : end + AFTER]),
                }
    return None


def _line(text: str) -> str:
    """Text with its line breaks as spaces."""
    return "".join(" " if sign in "\r\n\t" else sign for sign in text)
