"""Export: rows to take away, with a note of how they came about."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components import exporting
from concept_audit_app.components.session import current_audit

audit = current_audit()
st.title("Export")
chosen = exporting.choose(audit)
count = exporting.count(audit, chosen)
if not count:
    exporting.nothing(chosen)
    st.stop()
exporting.downloads(audit, chosen, count)
exporting.preview(audit, chosen, count)
