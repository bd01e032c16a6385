"""Rows like the one that is looked at, whatever it was ranked by."""

from __future__ import annotations

import streamlit as st

from concept_audit import AuditError
from concept_audit_app.components.heatmap import text_html
from concept_audit_app.components.session import current_audit
from concept_audit_app.components.tables import records

LIKE = 8
SNIPPET = 140
"""Characters of a response that are shown."""


def similar_rows(example_id: int, layer: int) -> None:
    """A popover that finds the rows nearest to this one when it is opened, and leads to them."""
    opened = st.popover(
        "Similar", icon=":material/join_inner:", type="tertiary", key=f"similar-{example_id}", on_change="rerun"
    )
    if not opened.open:
        return
    audit = current_audit()
    with opened:
        try:
            found = audit.rows.similar(example_id, layer, LIKE)
        except AuditError as error:
            st.info(str(error), icon=":material/info:")
            return
        if found.empty:
            st.info("There is no other row.", icon=":material/info:")
            return
        st.caption(f"Nearest by mean response activation at layer {layer}: cosine, about the mean of all rows.")
        lines = [
            f'<div class="like"><b>{row["similarity"]:.2f}</b><span>{text_html(_snippet(row["response"]))}</span>'
            f"<i>{text_html(row['flag']) if isinstance(row['flag'], str) else ''}</i></div>"
            for row in records(found)
        ]
        st.html("".join(lines))
        together = [str(example_id), *map(str, found["example_id"])]
        kept = {name: value for name, value in st.query_params.items() if name in ("audit", "concept", "method")}
        st.page_link(
            "app_pages/ranking.py",
            label=f"Show these {len(together)} together",
            icon=":material/open_in_full:",
            query_params={**kept, "row": ",".join(together)},
        )


def _snippet(response: str) -> str:
    return " ".join(response.split())[:SNIPPET] or "(no response)"
