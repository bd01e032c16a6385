"""The filter in force, said in words: a chip for each part of it, with a cross that takes the part away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import streamlit as st

from concept_audit import Audit, RowFilter
from concept_audit_app.components.filters import FLAG_CHOICES, PAIR_FLAG_CHOICES, all_tokens, brush_chip
from concept_audit_app.components.plain import plain
from concept_audit_app.components.session import first_page

LONGEST = 40
"""Characters of a chip."""


def filter_chips(audit: Audit, where: RowFilter) -> None:
    """A chip for each part of a filter, in the widgets' order; brushed scores and a single row last."""
    for key, words, empty in _parts(audit, where):
        shown = words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
        st.button(
            plain(shown),
            icon=":material/close:",
            key=f"without-{key}",
            type="tertiary",
            on_click=_forget,
            args=(key, empty),
            help=f"Without “{plain(words)}”",
        )
    brush_chip(where, hint=False)


def _parts(audit: Audit, where: RowFilter) -> Iterator[tuple[str, str, Any]]:
    """The key of each widget that narrows the view, what it says, and its value that narrows nothing."""
    if where.text:
        yield "find", f"“{where.text}”", ""
    if where.flag:
        yield "flag", (FLAG_CHOICES | PAIR_FLAG_CHOICES).get(where.flag, where.flag), ""
    for field, values in where.metadata.items():
        yield f"where_{field}", f"{field}: {' or '.join(values)}", []
    if where.sources:
        yield "source", f"source: {' or '.join(where.sources)}", []
    if where.tokens is not None:
        low, high = where.tokens
        yield "tokens", f"{low:,} to {high:,} tokens", all_tokens(audit)


def _forget(key: str, empty: Any) -> None:
    st.session_state[key] = empty
    first_page()
