"""Audit: the rows by their influence on a concept."""

from __future__ import annotations

import math
from dataclasses import replace

import streamlit as st

from app.components.charts import score_histogram
from app.components.concepts import concept_picker, probe_quality
from app.components.filters import row_filter
from app.components.heatmap import legend_html, ramp
from app.components.rows import row_card
from app.components.session import current_audit, first_page
from backend import METHODS, Audit, AuditError, Concept, RowFilter, to_bytes

PAGE_SIZES = [10, 25, 50]
METHOD_NAMES = {"vector_filter": "Vector filter"}


def legend_words(audit: Audit, concept: Concept) -> str:
    """What the colours of the tokens are."""
    if concept.kind == "sae_feature":
        return f"activation of the feature at each token (layer {concept.layer})"
    quality = next((dict(probe.details) for probe in audit.probes() if probe.name == concept.name), {})
    return (
        f"each token's projection on the probe (layer {concept.layer}), about the data's mean; "
        f"held-out AUROC {probe_quality(quality)}"
    )


audit = current_audit()
st.title("Audit")
with st.container(horizontal=True, vertical_alignment="bottom"):
    concept_id = concept_picker(audit)
    if concept_id is None:
        st.info("There is no concept yet to rank the data by. Draw a probe first.", icon=":material/science:")
        st.page_link("app_pages/probe_lab.py", label="Probe lab", icon=":material/science:")
        st.stop()
    method = st.selectbox(
        "Method", METHODS, format_func=lambda name: METHOD_NAMES.get(name, name), key="method",
        bind="query-params", on_change=first_page, width=200,
        help="Vector filter: the row's mean response activation projected onto the concept",
    )  # fmt: skip
    size = st.segmented_control(
        "Rows a page", PAGE_SIZES, default=PAGE_SIZES[0], required=True, key="size", bind="query-params",
        on_change=first_page,
    )  # fmt: skip
where = row_filter(audit)

try:
    with st.spinner("Ranking the rows …"):
        audit.ranking(concept_id, method)
except AuditError as error:
    st.error(str(error), icon=":material/error:")
    st.stop()
concept = audit.concept(concept_id)
total = audit.count(where, concept_id, method)
pages = max(1, math.ceil(total / size))
if st.session_state.get("page", 1) > pages:
    st.session_state["page"] = pages
histogram_place = st.container()


def flag_all(flag: str | None) -> None:
    """Flag, or unflag, every row that passes the filter."""
    audit.flag_matching(where, flag, concept_id, method)


with st.container(horizontal=True, vertical_alignment="center"):
    page = st.pagination(pages, key="page", bind="query-params")
    st.markdown(f"{total:,} rows", width="content")
    st.space("stretch")
    with st.popover(f"All {total:,} rows", icon=":material/checklist:", disabled=not total):
        st.caption("Every row that passes the filter, on all pages")
        st.button(
            "Flag to remove", icon=":material/delete:", on_click=flag_all, args=("remove",), width="stretch"
        )
        st.button(
            "Flag to review",
            icon=":material/visibility:",
            on_click=flag_all,
            args=("review",),
            width="stretch",
        )
        st.button(
            "Take flags off", icon=":material/flag_circle:", on_click=flag_all, args=(None,), width="stretch"
        )
        st.download_button(
            "Download this ranking (CSV)", lambda: to_bytes(audit.rank_table(concept_id, method, where=where), "csv"),
            file_name=f"{audit.name}-ranking.csv", mime="text/csv", icon=":material/download:", width="stretch",
            on_click="ignore",
        )  # fmt: skip
    flagged = audit.count(RowFilter(flag="any"))
    st.download_button(
        f"{flagged:,} flagged (CSV)", lambda: to_bytes(audit.export_table(RowFilter(flag="any")), "csv"),
        file_name=f"{audit.name}-flagged.csv", mime="text/csv", icon=":material/download:", disabled=not flagged,
        on_click="ignore", key="download-flagged",
    )  # fmt: skip

legend_place = st.container(horizontal=True, vertical_alignment="center")
rows = audit.rank(concept_id, method, size, where, (page - 1) * size)
filtered = where != RowFilter()
with histogram_place:
    edges, everything, passing = audit.histogram(concept_id, method, where)
    span = (rows["score"].min(), rows["score"].max()) if len(rows) else None
    st.plotly_chart(
        score_histogram(edges, everything, passing, filtered, span), key="histogram",
        config={"displayModeBar": False}, alt="Histogram of the scores of all rows",
    )  # fmt: skip

if rows.empty:
    unflagged = replace(where, flag="")
    hint = (
        "Widen the filters above."
        if not where.flag or not audit.count(unflagged, concept_id)
        else "Choose “Flagged or not” above."
    )
    st.info(f"No row passes the filters. {hint}", icon=":material/filter_alt_off:")
    st.stop()
try:
    with st.spinner("Computing the token values of these rows …"):
        heatmaps = audit.heatmaps(concept_id, rows["example_id"].tolist())
except AuditError as error:
    st.warning(f"No heatmaps: {error}", icon=":material/warning:")
    heatmaps = {}
centre = audit.score_summary(concept_id, method)["mean"] if concept.kind == "probe" else 0.0
colours = ramp(heatmaps.values(), centre)
if heatmaps:
    with legend_place:
        st.html(legend_html(colours), width="content")
        st.caption(legend_words(audit, concept))
for row in rows.to_dict("records"):
    row_card(row, heatmaps.get(row["example_id"]), colours)
