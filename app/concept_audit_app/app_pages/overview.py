"""Overview: what to do next, what was found, what is running, and what the data are."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from concept_audit_app.components import next_steps, overview
from concept_audit_app.components.plain import plain
from concept_audit_app.components.session import current_audit

audit = current_audit()
made = audit.manifest.configuration
st.title(plain(audit.name))
st.caption(
    f"{plain(Path(made['data']).name)} · {plain(made['model'])} ({made['dtype']}) · "
    f"layers {', '.join(map(str, made['layers']))}"
)
if audit.device_note:
    st.text(audit.device_note)
overview.counts(audit)
overview.left_out(audit)
probes, features = next_steps.probes_found(audit), next_steps.features_found(audit)
next_steps.next_step(audit, probes, features)
left, right = st.columns(2, gap="large")
with left:
    st.subheader("Probes")
    if not probes:
        st.info(
            "No probes yet. A probe is a concept that you draw yourself, from a few labelled examples.",
            icon=":material/science:",
        )
    next_steps.list_found(audit, probes)
    if features:
        st.subheader("SAE features that stand out")
        overview.sae_quality(audit)
        next_steps.list_found(audit, features)
        st.page_link("app_pages/concepts.py", label="Search all features", icon=":material/category:")
with right:
    overview.running(audit)
    overview.data(audit)
    overview.stages(audit)
overview.separating(audit)
