"""Probe lab: draw a concept from labelled examples."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components import labelling, probes
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.index import warm
from concept_audit_app.components.session import current_audit, read_only

WAYS = ["Queue", "Search", "Typed", "File"]

audit = current_audit()
style_sheet()
warm(audit)
st.title("Probe lab")
st.caption(
    "A probe is a direction in the model's activations that tells examples of a behaviour from examples without it. "
    "Label some of both, train, and rank the whole data set by it."
)

labelling.do_labels()
latest = st.session_state.get("probe-latest")
typed = st.session_state.get("probe")  # a new one has no labels yet
names = audit.labels.counts()["probe"].tolist()
with st.container(horizontal=True, vertical_alignment="bottom"):
    name = st.selectbox(
        "Probe",
        [*names, *([typed] if typed and typed not in names else [])],
        index=names.index(latest) if latest in names else 0 if len(names) == 1 else None,
        key="probe",
        bind="query-params",
        accept_new_options=not read_only(),
        placeholder="Choose a probe, or type a name for a new one" if names else "Type a name for a new probe",
        help="Choose one, or type a new name and press Enter",
    )
    st.session_state["probe-latest"] = name
    saved = audit.probes.find(name) if name else None
    if name and name in names:
        probes.housekeeping(audit, name, saved)
    probes.import_box(audit)
if problem := st.session_state.pop("lab_error", None):
    st.error(problem, icon=":material/error:")
if not name:
    st.info(
        "There is no probe yet."
        if read_only() and not names
        else "Type a name for your probe above, for instance the behaviour that you are after."
        if not names
        else "Choose a probe above, or type a name for a new one.",
        icon=":material/edit:",
    )
    st.stop()

left, right = st.columns([7, 5], gap="large")
labels = audit.labels.list(name)
with left:
    if read_only():
        st.info("This dashboard is read-only: labels can be looked at, not changed.", icon=":material/lock:")
    else:
        way = st.segmented_control(
            "Label examples from", WAYS, default=WAYS[0], required=True, key="from", bind="query-params"
        )
        if way == "Queue":
            labelling.queue(audit, name, saved is not None)
        elif way == "Search":
            labelling.search_results(audit, name)
        elif way == "Typed":
            labelling.typed(name)
        else:
            labelling.uploaded(audit, name)
with right:
    with st.container(border=True):
        if not read_only():
            probes.training(audit, name, labels, saved)
        if saved:
            probes.trained_figures(saved)
            probes.links(audit, name)
    with st.container(border=True):
        probes.report(audit, name, labels, saved)
    if saved:
        probes.nearest(audit, saved)
    probes.labelled(audit, name, labels)
