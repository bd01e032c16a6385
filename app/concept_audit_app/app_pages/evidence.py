"""Evidence: how far the methods agree with what is known of the rows."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components import evidence
from concept_audit_app.components.ranked import chosen_concept
from concept_audit_app.components.session import current_audit

CONCEPT_WIDTH = 640

audit = current_audit()
st.title("Evidence")
st.caption(
    "A ranking is an opinion. Here it is held against what the data say of themselves: a column that tells where a row "
    "came from, the labels of a probe, the flags that people set; and against what training without its top rows does."
)
with st.container(width=CONCEPT_WIDTH):
    concept = chosen_concept(audit)
found = evidence.choose_validation(audit, concept)
if found is not None:
    evidence.validation(found)
target = evidence.choose_target(audit, found)
evidence.against_labels(audit, concept, target)
evidence.agreement(audit, concept)
