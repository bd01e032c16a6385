"""Probe lab: draw a concept from labelled examples."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components import labelling, probes
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.index import warm
from concept_audit_app.components.lab import choose_probe, invitation, top_change
from concept_audit_app.components.session import current_audit, read_only

WAYS = ["Queue", "Search", "Typed", "File"]

audit = current_audit()
style_sheet()
warm(audit)
with st.container(horizontal=True, vertical_alignment="center", key="bar"):
    st.title("Probe lab", width="content")
    name, labelled = choose_probe(audit)
    saved = audit.probes.find(name) if name else None
    if name and labelled:
        probes.housekeeping(audit, name, saved)
    probes.import_box(audit)
if problem := st.session_state.pop("lab_error", None):
    st.error(problem, icon=":material/error:")
if not name:
    invitation(audit)
    st.stop()

labels = audit.labels.list(name)
with st.container(key="lab"):
    left, right = st.columns([14, 5], gap="medium")
with left:
    if read_only():
        st.info("This dashboard is read-only: labels can be looked at, not changed.", icon=":material/lock:")
    else:
        with st.container(horizontal=True, vertical_alignment="center", key="ways"):
            way = st.segmented_control(
                "Label examples from",
                WAYS,
                default=WAYS[0],
                required=True,
                key="from",
                bind="query-params",
                label_visibility="collapsed",
            )
            beside = st.container(horizontal=True, vertical_alignment="center")
        if way == "Queue":
            labelling.queue(audit, name, saved is not None, beside)
        elif way == "Search":
            labelling.search_results(audit, name)
        elif way == "Typed":
            labelling.typed(name)
        else:
            labelling.uploaded(audit, name)
with right:
    with st.container(border=True):
        if not read_only():
            probes.training(audit, name, labels, saved, with_counts=way != "Queue")
        if saved:
            probes.trained_figures(saved)
            probes.links(audit, name)
    if saved:
        top_change(audit, name)
    with st.container(border=True):
        probes.report(audit, name, labels, saved)
    if saved:
        probes.nearest(audit, saved)
    probes.labelled(audit, name, labels)
