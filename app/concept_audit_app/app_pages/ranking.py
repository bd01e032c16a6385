"""Audit: the rows by their influence on a concept."""

from __future__ import annotations

import math
from dataclasses import replace

import streamlit as st

from concept_audit import RowFilter
from concept_audit_app.components.charts import QUIET, score_histogram
from concept_audit_app.components.exporting import WHAT
from concept_audit_app.components.filters import brush, brush_chip, brushed, row_filter
from concept_audit_app.components.flags import View, bulk_flags, undo_button
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.index import index_in_words
from concept_audit_app.components.methods import influence_options, method_picker
from concept_audit_app.components.plain import counted
from concept_audit_app.components.ranked import cards, chosen_concept, colour_choice, ready
from concept_audit_app.components.refining import refinement_state
from concept_audit_app.components.row_keys import do_acts, row_keys
from concept_audit_app.components.rows import page_problem
from concept_audit_app.components.session import current_audit, first_page

PAGE_SIZES = [10, 25, 50]
# Pixels, enough for seven numbers: as wide as its content, it hides page 2 of 3.
PAGES_WIDTH = 340

audit = current_audit()
do_acts()
style_sheet()
st.title("Audit")
with st.container(horizontal=True, vertical_alignment="bottom"):
    concept = chosen_concept(audit)
    method = method_picker(audit, concept)
    options = influence_options(audit, concept, method)
    size = st.segmented_control(
        "Rows a page",
        PAGE_SIZES,
        default=PAGE_SIZES[0],
        required=True,
        key="size",
        bind="query-params",
        on_change=first_page,
    )
where = brushed(row_filter(audit))
indexed = ready(audit, concept, method, options)
ranked = (concept.concept_id, method)
total = audit.rows.count(where, *ranked, options)
pages = max(1, math.ceil(total / size))
if st.session_state.get("page", 1) > pages:
    st.session_state["page"] = pages
histogram_place = st.container()
saved = audit.probes.find(concept.name) if concept.kind == "probe" else None
threshold = saved.details.get("threshold") if saved and method == "vector_filter" else None

with st.container(horizontal=True, vertical_alignment="center"):
    page = st.pagination(pages, key="page", bind="query-params", width=PAGES_WIDTH)
    st.markdown(counted(total, "row"), width="content")
    brush_chip(where)
    st.space("stretch")
    bulk_flags(View(*ranked, options, where, total, threshold))
    undo_button(audit)
    st.page_link(
        "app_pages/export.py",
        label="Export this view",
        icon=":material/download:",
        query_params=[*((k, v) for k in st.query_params for v in st.query_params.get_all(k)), ("rows", WHAT["view"])],
    )
page_problem()

rows = audit.rank(*ranked, size, where, (page - 1) * size, options)
with histogram_place:
    edges, everything, passing = audit.rankings.histogram(*ranked, where, options=options)
    span = (rows["score"].min(), rows["score"].max()) if len(rows) else None
    st.plotly_chart(
        score_histogram(edges, everything, passing, where != RowFilter(), span, where.scores, threshold),
        key="histogram",
        config=QUIET,
        on_select=brush,
        selection_mode="box",
        alt=f"Histogram of the scores of all rows, from {edges[0]:.3g} to {edges[-1]:.3g}; {counted(total, 'row')} within the filter",
    )
if indexed and (index := audit.index.describe()):
    refinement_state(audit, *ranked, options)
    st.caption(index_in_words(audit, index))
if rows.empty:
    narrowed = where.flag and audit.rows.count(replace(where, flag=""), *ranked, options)
    hint = "Choose “Flagged or not” above." if narrowed else "Widen the filters above."
    st.info(f"No row passes the filters. {hint}", icon=":material/filter_alt_off:")
    st.stop()

legend = st.container(horizontal=True, vertical_alignment="center")
with legend:
    row_keys([(int(number), str(text)) for number, text in zip(rows["example_id"], rows["content_hash"], strict=True)])
    colour_by = colour_choice(method, indexed)
cards(audit, rows, concept, method, options, colour_by, indexed, legend)
