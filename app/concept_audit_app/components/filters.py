"""The filters above a list of rows, each bound to the URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import streamlit as st
from streamlit.elements.lib.mutable_popover_container import PopoverContainer

from concept_audit import Audit, RowFilter
from concept_audit_app.components.facet_filter import SOURCE, facets_in_url, span
from concept_audit_app.components.paging import first_page
from concept_audit_app.components.plain import counted
from concept_audit_app.components.tables import records
from concept_audit_app.components.url import in_url, put

FEW_VALUES = 30
FLAG_CHOICES = {
    "": "Flagged or not",
    "any": "Flagged",
    "none": "Not flagged",
    "remove": "To remove",
    "review": "To review",
    "keep": "Kept",
    "unseen": "Not seen yet",
}
TEXT_IN: dict[Literal["", "prompt", "response"], str] = {
    "": "Anywhere",
    "prompt": "In the prompt",
    "response": "In the response",
}
PAIR_FLAG_CHOICES = {**FLAG_CHOICES, "swap": "To swap"}
"""Of preference pairs."""


def row_filter(audit: Audit, flag: bool = True) -> RowFilter:
    """Text, flag, length, source and metadata filters above a list; what they let through.

    What the URL asks besides, since it comes from the Audit page, holds too.
    """
    few = few_values(audit)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = _text()
        chosen = _flag(audit) if flag else ""
        kept = {field["field"]: _values(field) for field in records(few.head(2))}
        with st.popover("More filters", icon=":material/filter_alt:"):
            kept |= {field["field"]: _values(field) for field in records(few.iloc[2:])}
            text_in, source, tokens = _text_in(), _sources(audit), _tokens(audit)
    held = {*(f"where_{name}" for name in kept), SOURCE}
    asked = facets_in_url(audit.rows.metadata_fields()["field"], held)
    metadata = {name: tuple(values) for name, values in kept.items() if values}
    return RowFilter(
        text=text,
        text_in=text_in,
        metadata={**metadata, **asked.metadata},
        flag=chosen,
        sources=source,
        tokens=tokens,
        without=asked.without,
        ranges=asked.ranges,
        without_sources=asked.without_sources,
    )


def desk_filter(audit: Audit, sizes: Sequence[int]) -> tuple[RowFilter, int, PopoverContainer]:
    """As `row_filter`, in one line: a search box, and a popover for the rest.

    Args:
        sizes: rows a page that can be chosen.

    Returns:
        the filter, how many rows a page has, and the popover, in which the facets have their place.
    """
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        text = _text(bare=True)
        place = st.popover("Filters", icon=":material/filter_alt:", key="filters", on_change="rerun")
        size = st.segmented_control(
            "Rows a page",
            sizes,
            default=sizes[0],
            required=True,
            key="size",
            bind="query-params",
            on_change=first_page,
            label_visibility="collapsed",
        )
    with place, st.container(horizontal=True, vertical_alignment="bottom", key="filter-boxes"):
        chosen = _flag(audit)
        text_in = _text_in()
        tokens = _tokens(audit)
    asked = facets_in_url(audit.rows.metadata_fields()["field"])
    return RowFilter(text=text, text_in=text_in, flag=chosen, tokens=tokens, **vars(asked)), size, place


def few_values(audit: Audit) -> pd.DataFrame:
    """The metadata fields of which a box can list every value."""
    fields = audit.rows.metadata_fields()
    return fields[(fields.n_values > 1) & (fields.n_values <= FEW_VALUES)]


def _text(bare: bool = False) -> str:
    found = st.text_input(
        "Text",
        key="find",
        bind="query-params",
        type="search",
        placeholder='words, or "a phrase"',
        icon=":material/search:",
        on_change=first_page,
        label_visibility="collapsed" if bare else "visible",
        help=None
        if bare
        else "Rows in which all these words occur, in the prompt or the response, whatever their case; what stands in "
        "double quotes occurs as it is.",
    )
    return found or ""


def _flag(audit: Audit) -> str:
    choices = PAIR_FLAG_CHOICES if audit.manifest.pair else FLAG_CHOICES
    chosen = st.selectbox(
        "Flags",
        list(choices),
        format_func=choices.__getitem__,
        key="flag",
        bind="query-params",
        on_change=first_page,
        width=180,
    )
    return chosen or ""


def _text_in() -> Literal["", "prompt", "response"]:
    chosen = st.selectbox(
        "Words are",
        list(TEXT_IN),
        format_func=lambda place: TEXT_IN[place],
        key="in",
        bind="query-params",
        on_change=first_page,
        width=180,
    )
    return chosen or ""


def _sources(audit: Audit) -> tuple[str, ...]:
    sources = audit.rows.sources()["source"].tolist()
    if len(sources) < 2:
        return ()
    return tuple(
        st.multiselect("Source", sources, key="source", bind="query-params", placeholder="any", on_change=first_page)
    )


def _tokens(audit: Audit) -> tuple[int, int] | None:
    every = all_tokens(audit)
    tokens = st.slider("Tokens", *every, every, key="tokens", bind="query-params", on_change=first_page)
    return None if tokens == every else (int(tokens[0]), int(tokens[1]))


def all_tokens(audit: Audit) -> tuple[int, int]:
    """The span of lengths that lets every row through; wider than a point, which no slider can show."""
    return 1, max(int(audit.rows.longest()), 2)


def _values(field: Mapping[str, Any]) -> list[str]:
    return st.multiselect(
        str(field["field"]),
        sorted(field["top_values"]),
        key=f"where_{field['field']}",
        bind="query-params",
        placeholder="any",
        on_change=first_page,
    )


def brushed(where: RowFilter) -> RowFilter:
    """The filter with the span of scores that was brushed in the histogram, and the rows that were opened.

    They are in the URL as ``scores`` and ``row``.
    """
    opened = (in_url("row") or "").split(",")
    if all(row.isdecimal() for row in opened):
        where = replace(where, example_ids=tuple(map(int, opened)))
    scores = span(in_url("scores"))
    return where if scores is None else replace(where, scores=scores)


def brush(chart: str = "histogram") -> None:
    """Take the span brushed in a chart into the URL; a click beside it takes it out."""
    boxes = st.session_state[chart].selection.box
    span = sorted(boxes[0]["x"]) if boxes else None
    put("scores", f"{span[0]:.6g}..{span[1]:.6g}" if span else None)
    first_page()


def forget_brush() -> None:
    """Take the span of scores out of the URL."""
    put("scores", None)
    first_page()


def brush_chip(where: RowFilter, hint: bool = True) -> None:
    """The brushed span and the rows that were opened, each with a button to let it go.

    Args:
        hint: say how a span is brushed, where there is a histogram.
    """
    if where.example_ids is not None:
        more = len(where.example_ids) > 1
        st.button(
            f"{counted(len(where.example_ids), 'row')} alone" if more else f"Row {where.example_ids[0]:,} alone",
            icon=":material/close:",
            key="forget-row",
            on_click=put,
            args=("row", None),
            help="Show all rows again",
        )
    if where.scores is not None:
        low, high = where.scores
        st.button(
            f"Scores {low:.4g} to {high:.4g}",
            icon=":material/close:",
            key="forget-brush",
            on_click=forget_brush,
            help="Let rows of all scores through again",
        )
    elif hint:
        st.caption("Drag across the histogram to keep rows of those scores.")
