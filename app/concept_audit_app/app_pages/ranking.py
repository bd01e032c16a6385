"""Audit: the rows by their influence on a concept; a list, the row that the cursor rests on, and keys."""

from __future__ import annotations

import math
from dataclasses import replace

import streamlit as st

from concept_audit import RowFilter
from concept_audit_app.components.act_on_many import act_on_many
from concept_audit_app.components.charts import QUIET, score_histogram
from concept_audit_app.components.desk import desk, list_rows
from concept_audit_app.components.exporting import WHAT
from concept_audit_app.components.facets import facets
from concept_audit_app.components.fidelity import fidelity
from concept_audit_app.components.filter_chips import filter_chips
from concept_audit_app.components.filters import brush, brushed, desk_filter
from concept_audit_app.components.flags import View, undo_button, verdicts_in_words
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.methods import influence_options, method_picker
from concept_audit_app.components.paging import page_in_url
from concept_audit_app.components.plain import counted
from concept_audit_app.components.ranked import cards, chosen_concept, colour_choice, ready
from concept_audit_app.components.refining import foresee
from concept_audit_app.components.rows import page_problem
from concept_audit_app.components.scale import scale_of
from concept_audit_app.components.session import current_audit

PAGE_SIZES = [10, 25, 50]

audit = current_audit()
style_sheet()
bar = st.container(key="bar", horizontal=True, vertical_alignment="center", gap="small")
with bar:
    st.html("<h1>Audit</h1>", width="content")
    concept = chosen_concept(audit, bare=True)
    method = method_picker(audit, concept, bare=True)
    options = influence_options(audit, concept, method)
strip = st.container(key="strip")
desk_place = st.container(key="workplace")
with desk_place:
    left, right = st.columns([9, 11], gap="small")
with left:
    where, size, drawer = desk_filter(audit, PAGE_SIZES)
where = brushed(where)
indexed = ready(audit, concept, method, options)
ranked = (concept.concept_id, method)
scale = scale_of(method, audit.rankings.summary(*ranked, options))
total = audit.rows.count(where, *ranked, options)
pages = max(1, math.ceil(total / size))
page = page_in_url(pages)
saved = audit.probes.find(concept.name) if concept.kind == "probe" else None
# A threshold is of the projection as it is: the score of a rollout is that times its advantage.
plain = method == "vector_filter" and audit.manifest.rollouts is None
threshold = saved.details.get("threshold") if saved and plain else None
view = View(*ranked, options, where, total, threshold)
if drawer.open:
    with drawer:
        facets(audit, *ranked, options, where)
with bar:
    fidelity(audit, concept, method, options, indexed)
    st.space("stretch")
    act_on_many(view)
    undo_button(audit)
    st.page_link(
        "app_pages/export.py",
        label="Export this view",
        icon=":material/download:",
        query_params=[*((k, v) for k in st.query_params for v in st.query_params.get_all(k)), ("rows", WHAT["view"])],
    )
    with st.popover("Scores", icon=":material/help:", type="tertiary"):
        st.markdown(scale.help())
with left:
    with st.container(key="told"):
        st.markdown(verdicts_in_words(view, audit.overview().n_rows))
        filter_chips(audit, where)
    page_problem()

rows = audit.rank(*ranked, size, where, (page - 1) * size, options)
edges, everything, passing = audit.rankings.histogram(*ranked, where, options=options)
with strip:
    span = (rows["score"].min(), rows["score"].max()) if len(rows) else None
    st.plotly_chart(
        score_histogram(edges, everything, passing, where != RowFilter(), span, where.scores, threshold, scale),
        key="histogram",
        config=QUIET,
        on_select=brush,
        selection_mode="box",
        alt=f"Histogram of the scores of all rows, from {edges[0]:.3g} to {edges[-1]:.3g}; {counted(total, 'row')} within "
        "the filter. Drag across it to keep rows of those scores",
    )
if rows.empty:
    narrowed = where.flag and audit.rows.count(replace(where, flag=""), *ranked, options)
    hint = "Choose “Flagged or not” above." if narrowed else "Widen the filters above."
    left.info(f"No row passes the filters. {hint}", icon=":material/filter_alt_off:")
    st.stop()

with left:
    windows = audit.documents.places([int(i) for i in rows["example_id"]])
    furthest = max(abs(scale.of(edges[0])), abs(scale.of(edges[-1])))
    desk(list_rows(rows, scale, where, windows), furthest, pages, where)
with right:
    legend = st.container(key="legend", horizontal=True, vertical_alignment="center", gap="small")
    with legend:
        colour_by = colour_choice(method, indexed)
    with st.container(key="desk-row", gap=None):
        cards(audit, rows, concept, method, options, colour_by, indexed, legend, scale, windows)
foresee(audit, concept)
