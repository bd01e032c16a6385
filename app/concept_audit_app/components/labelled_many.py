"""What the visitor labelled last by one act, until it is undone or flags have changed since."""

from __future__ import annotations

import streamlit as st

from concept_audit import Audit, AuditError, LabelChange
from concept_audit_app.components.plain import counted


def remember_labels(audit: Audit, change: LabelChange) -> None:
    """Make an act that has labelled many rows the one that is undone next."""
    st.session_state[_key(audit)] = (change, audit.flags.latest()[0])


def labelled_last(audit: Audit) -> LabelChange | None:
    """The act that is undone next, where it is one that has labelled rows; None where it is a change of flags."""
    change, since = st.session_state.get(_key(audit), (None, 0))
    return change if audit.flags.latest()[0] == since else None


def undo_labels(audit: Audit) -> None:
    """Take back all labels of that act."""
    change = labelled_last(audit)
    if change is None:
        return
    try:
        count = audit.queue.undo_labels(change)
    except AuditError as error:
        st.session_state["row_problem"] = str(error)
        return
    del st.session_state[_key(audit)]
    left = len(change.before) - count
    more = f"; {left:,} labelled otherwise since, left alone" if left else ""
    st.session_state["said"] = f"Undone: {counted(count, 'label')} for {change.probe}{more}"


def _key(audit: Audit) -> str:
    return f"labelled-{audit.name}"
