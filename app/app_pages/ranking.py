"""Audit: the rows by their influence on a concept."""

from __future__ import annotations

import math
from dataclasses import replace

import streamlit as st

from app.components.charts import score_histogram
from app.components.concepts import concept_picker, probe_quality
from app.components.filters import row_filter
from app.components.heatmap import legend_html, ramp
from app.components.index import exact_check, fidelity_words
from app.components.methods import SLOW, WITH_GRADIENTS, influence_options, method_picker, offer
from app.components.progress import PageProgress
from app.components.rows import RowCard
from app.components.session import current_audit, first_page
from backend import Audit, AuditError, Concept, RowFilter, to_bytes

PAGE_SIZES = [10, 25, 50]
COLOURS = {"influence": "Influence", "activation": "Activation"}


def legend_words(audit: Audit, concept: Concept, by: str) -> str:
    """What the colours of the tokens are."""
    if by == "influence":
        return "what each token adds to the row's score; prompt tokens add the rest, which the card names"
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
    method = method_picker()
    try:
        concept = audit.concept(concept_id)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        st.stop()
    options = influence_options(audit, concept, method)
    size = st.segmented_control(
        "Rows a page", PAGE_SIZES, default=PAGE_SIZES[0], required=True, key="size", bind="query-params",
        on_change=first_page,
    )  # fmt: skip
where = row_filter(audit)

try:
    indexed = method in WITH_GRADIENTS and audit.served_by_index(concept_id, method, options)
    if method in SLOW and not indexed and not audit.has_ranking(concept_id, method, options):
        offer(audit, concept, method, options)
        st.stop()
    with st.spinner("Ranking the rows …"):
        audit.ranking(concept_id, method, options, PageProgress())
except AuditError as error:
    st.error(str(error), icon=":material/error:")
    st.stop()
total = audit.count(where, concept_id, method, options)
pages = max(1, math.ceil(total / size))
if st.session_state.get("page", 1) > pages:
    st.session_state["page"] = pages
histogram_place = st.container()


def flag_all(flag: str | None) -> None:
    """Flag, or unflag, every row that passes the filter."""
    audit.flag_matching(where, flag, concept_id, method, options=options)


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
            "Download this ranking (CSV)", lambda: to_bytes(audit.rank_table(concept_id, method, where=where, options=options), "csv"),
            file_name=f"{audit.name}-ranking.csv", mime="text/csv", icon=":material/download:", width="stretch",
            on_click="ignore",
        )  # fmt: skip
    flagged = audit.count(RowFilter(flag="any"))
    st.download_button(
        f"{flagged:,} flagged (CSV)", lambda: to_bytes(audit.export_table(RowFilter(flag="any")), "csv"),
        file_name=f"{audit.name}-flagged.csv", mime="text/csv", icon=":material/download:", disabled=not flagged,
        on_click="ignore", key="download-flagged",
    )  # fmt: skip

colour_by = "activation"
legend_place = st.container(horizontal=True, vertical_alignment="center")
if method in WITH_GRADIENTS:
    with legend_place:
        colour_by = st.segmented_control(
            "Colour tokens by", list(COLOURS), default="activation" if indexed else "influence", required=True,
            format_func=COLOURS.__getitem__, key="colour-index" if indexed else "colour", bind="query-params",
        )  # fmt: skip
        if indexed:
            exact_check(audit, concept_id, method, options)
rows = audit.rank(concept_id, method, size, where, (page - 1) * size, options)
filtered = where != RowFilter()
with histogram_place:
    edges, everything, passing = audit.histogram(concept_id, method, where, options=options)
    span = (rows["score"].min(), rows["score"].max()) if len(rows) else None
    st.plotly_chart(
        score_histogram(edges, everything, passing, filtered, span), key="histogram",
        config={"displayModeBar": False}, alt="Histogram of the scores of all rows",
    )  # fmt: skip

if indexed and (index := audit.index()):
    st.caption(fidelity_words(index))

if rows.empty:
    unflagged = replace(where, flag="")
    hint = (
        "Widen the filters above."
        if not where.flag or not audit.count(unflagged, concept_id, method, options)
        else "Choose “Flagged or not” above."
    )
    st.info(f"No row passes the filters. {hint}", icon=":material/filter_alt_off:")
    st.stop()
ids = rows["example_id"].tolist()
own = audit.own_answers(ids) if method == "projection_difference" else {}
waiting = st.container()
# The order is there before the colours are: people may read on meanwhile.
cards = [RowCard(row, own.get(row["example_id"])) for row in rows.to_dict("records")]
exact: dict[int, float] = {}
try:
    with waiting, st.spinner("Computing the token values of these rows …"):
        if colour_by == "influence":
            heatmaps = audit.influence_heatmaps(concept_id, method, ids, options, PageProgress())
            exact = audit.exact_scores(concept_id, method, ids, options) if indexed else {}
        else:
            heatmaps = audit.heatmaps(concept_id, ids)
except AuditError as error:
    waiting.warning(f"No heatmaps: {error}", icon=":material/warning:")
    heatmaps = {}
projected = concept.kind == "probe" and colour_by == "activation"
centre = audit.score_summary(concept_id)["mean"] if projected else 0.0
colours = ramp(heatmaps.values(), centre)
if heatmaps:
    with legend_place:
        st.html(legend_html(colours), width="content")
        st.caption(legend_words(audit, concept, colour_by))
for number, card in zip(ids, cards, strict=True):
    card.fill(heatmaps.get(number), colours, exact.get(number))
