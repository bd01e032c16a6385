"""Overview: the data, the model, the concepts, and where to start."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from concept_audit_app.components import overview
from concept_audit_app.components.index import index_state
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
left, right = st.columns(2, gap="large")
with left:
    overview.where_to_start(audit)
    overview.probes(audit)
    st.subheader("Influence")
    index_state(audit)
    overview.data(audit)
with right:
    overview.standing_out(audit)
    overview.separating(audit)
    overview.stages(audit)
