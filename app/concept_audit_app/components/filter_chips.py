"""The filter in force, said in words: a chip for each part of it, with a cross that takes the part away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import streamlit as st

from concept_audit import Audit, RowFilter
from concept_audit_app.components.facet_filter import NO_SOURCE, SOURCE, forget
from concept_audit_app.components.filters import (
    FLAG_CHOICES,
    PAIR_FLAG_CHOICES,
    TEXT_IN,
    all_tokens,
    brush_chip,
    few_values,
)
from concept_audit_app.components.paging import first_page
from concept_audit_app.components.plain import plain

LONGEST = 40
"""Characters of a chip."""
Part = tuple[str, str, Callable[[], None]]
"""A parameter of the URL, what it says, and what takes it away."""


def filter_chips(audit: Audit, where: RowFilter) -> None:
    """A line with a chip for each part of a filter, in the widgets' order; brushed scores and a single row last."""
    if where == RowFilter():
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="chips"):
        for key, words, without in (*_of_widgets(audit, where), *_of_facets(where)):
            _chip(key, words, without)
        brush_chip(where, hint=False)


def chips_beside_widgets(audit: Audit, where: RowFilter) -> None:
    """Chips for what facets of the Audit page ask and no widget of `row_filter` shows."""
    shown = {SOURCE, *(f"where_{name}" for name in few_values(audit)["field"])}
    parts = [part for part in _of_facets(where) if part[0] not in shown]
    if parts:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            for key, words, without in parts:
                _chip(key, words, without)


def _chip(key: str, words: str, without: Callable[[], None]) -> None:
    shown = words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
    st.button(
        plain(shown),
        icon=":material/close:",
        key=f"without-{key}",
        type="tertiary",
        on_click=_forget,
        args=(without,),
        help=f"Without “{plain(words)}”",
    )


def _of_widgets(audit: Audit, where: RowFilter) -> Iterator[Part]:
    if where.text:
        place = f" {TEXT_IN[where.text_in].lower()}" if where.text_in else ""
        yield "find", f"“{where.text}”{place}", partial(_empty, "find", "")
    if where.flag:
        words = (FLAG_CHOICES | PAIR_FLAG_CHOICES).get(where.flag, where.flag)
        yield "flag", words, partial(_empty, "flag", "")
    if where.tokens is not None:
        low, high = where.tokens
        yield "tokens", f"{low:,} to {high:,} tokens", partial(_empty, "tokens", all_tokens(audit))


def _of_facets(where: RowFilter) -> Iterator[Part]:
    told: list[tuple[str, str]] = []
    for name, values in where.metadata.items():
        told.append((f"where_{name}", f"{name}: {' or '.join(values)}"))
    for name, values in where.without.items():
        told.append((f"not_{name}", f"{name} is not {' or '.join(values)}"))
    for name, (low, high) in where.ranges.items():
        told.append((f"range_{name}", f"{name}: {low:g} to {high:g}" if low < high else f"{name}: {low:g}"))
    if where.sources:
        told.append((SOURCE, f"source: {' or '.join(where.sources)}"))
    if where.without_sources:
        told.append((NO_SOURCE, f"source is not {' or '.join(where.without_sources)}"))
    for key, words in told:
        yield key, words, partial(forget, key)


def _empty(key: str, value: object) -> None:
    st.session_state[key] = value


def _forget(without: Callable[[], None]) -> None:
    without()
    first_page()
