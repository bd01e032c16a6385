"""Compare: two methods or two concepts, and the rows on which they disagree."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components import compare
from concept_audit_app.components.filter_chips import chips_beside_widgets
from concept_audit_app.components.filters import row_filter
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.rows import page_problem
from concept_audit_app.components.session import current_audit

audit = current_audit()
style_sheet()
st.title("Compare")
st.caption(
    "Two rankings of the same rows. Where they disagree one of them is wrong, or they ask different questions: the "
    "lexical rank beside each row tells matches of words from matches of meaning."
)
one, other = compare.choose_sides(audit)
where = row_filter(audit)
chips_beside_widgets(audit, where)
compare.figures(audit, one, other, where)
left, right = st.columns([3, 2], gap="large")
with left:
    compare.scatter(audit, one, other, where)
with right:
    compare.overlap(audit, one, other, where)
page_problem()
compare.disagreements(audit, one, other, where)
