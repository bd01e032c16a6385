"""The filters above a list of rows, each bound to the URL."""

from __future__ import annotations

import streamlit as st

from app.components.session import first_page
from backend import Audit, RowFilter

FEW_VALUES = 30
FLAG_CHOICES = {
    "": "Flagged or not",
    "any": "Flagged",
    "none": "Not flagged",
    "remove": "To remove",
    "review": "To review",
}


def row_filter(audit: Audit, flag: bool = True) -> RowFilter:
    """Text, flag and metadata filters; what they let through."""
    fields = audit.metadata_fields()
    few = fields[(fields.n_values > 1) & (fields.n_values <= FEW_VALUES)]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(
            "Text", key="find", bind="query-params", type="search", placeholder="in prompt or response",
            icon=":material/search:", on_change=first_page,
        )  # fmt: skip
        chosen = ""
        if flag:
            chosen = st.selectbox(
                "Flags", list(FLAG_CHOICES), format_func=FLAG_CHOICES.get, key="flag", bind="query-params",
                on_change=first_page,
            )  # fmt: skip
        metadata = {}
        for field in few.itertuples():
            kept = st.multiselect(
                str(field.field), sorted(field.top_values), key=f"where_{field.field}", bind="query-params",
                placeholder="any", on_change=first_page,
            )  # fmt: skip
            if kept:
                metadata[field.field] = tuple(kept)
    return RowFilter(text=text or "", metadata=metadata, flag=chosen or "")
