"""What the model itself would answer to the prompts of rows, where the visitor asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from concept_audit import AuditError
from concept_audit_app.components.session import current_audit


def ask_later(example_id: int) -> None:
    """Have the model answer a row's prompt when the page is drawn next, from a callback."""
    asked = st.session_state.setdefault("asked", [])
    if example_id not in asked:
        asked.append(example_id)


def answers_asked(example_ids: Sequence[int]) -> dict[int, str]:
    """The model's own answers to the rows of a page for which the visitor has asked."""
    audit = current_audit()
    found = {}
    for example_id in [i for i in st.session_state.get("asked", []) if i in example_ids]:
        try:
            with st.spinner(f"The model answers the prompt of row {example_id:,} …"):
                found[example_id] = audit.rows.ask_model(example_id)
        except AuditError as error:
            st.session_state["asked"].remove(example_id)
            st.warning(str(error), icon=":material/warning:")
    return found
