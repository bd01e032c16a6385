"""Flagging many rows at once, the log of changes, and undoing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from concept_audit import Audit, AuditError, InfluenceOptions, RowFilter
from concept_audit_app.components.labelled_many import labelled_last, undo_labels
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.tables import records

LOG_SHOWN = 12
SECONDS_BETWEEN_LOOKS = 3.0


@dataclass(frozen=True)
class View:
    """A ranked list of rows as the visitor sees it.

    Attributes:
        total: rows that pass the filter.
        threshold: of the probe, where it has one.
    """

    concept: str
    method: str
    options: InfluenceOptions
    where: RowFilter
    total: int
    threshold: float | None = None


VERDICTS = ("remove", "review", "swap", "keep")


def verdicts_in_words(view: View, everything: int) -> str:
    """How many rows pass, and what has been decided about them: "14 of 439 rows · 3 remove · 10 unseen"."""
    first = (
        counted(view.total, "row") if view.total == everything else f"{view.total:,} of {counted(everything, 'row')}"
    )
    return f"{first} · {decided(view, view.where)}"


def decided(view: View, where: RowFilter, top: int | None = None) -> str:
    """What has been decided about rows of a view, or about the first of them: "3 remove · 10 unseen"."""
    found = current_audit().flags.verdicts(where, view.concept, view.method, view.options, top)
    known = [f"{found[flag]:,} {flag}" for flag in VERDICTS if flag in found]
    others = sum(count for flag, count in found.items() if flag is not None and flag not in VERDICTS)
    parts = [*known, *([f"{others:,} other"] if others else []), f"{found.get(None, 0):,} unseen"]
    return " · ".join(parts)


def undo_button(audit: Audit) -> None:
    """Undo the visitor's latest change that is not undone yet; printed with its key."""
    if read_only():
        return
    message = st.session_state.pop("said", None)
    if message:
        st.toast(message)
    labelled = labelled_last(audit)
    mine = audit.flags.undoable(person())
    last = next(iter(records(mine)), None)
    told = "Nothing to undo" if last is None else f"Undo: {plain(_action(last))}"
    if labelled is not None:
        told = f"Undo: label {counted(len(labelled.before), 'text')} for {plain(labelled.probe)}"
    st.button(
        "Undo",
        icon=":material/undo:",
        key="undo",
        disabled=last is None and labelled is None,
        on_click=_undo if labelled is None else undo_labels,
        args=(None if last is None else int(last["event_id"]),) if labelled is None else (audit,),
        help=told,
    )
    opened = st.popover("Log", icon=":material/history:", key="flag-log", on_change="rerun")
    if not opened.open:
        return
    log = audit.flags.log(LOG_SHOWN)
    with opened:
        st.caption("Who flagged what and when. Any change can be undone; nothing is ever taken from the log.")
        if log.empty:
            st.caption("Nobody has flagged a row yet.")
        for change in records(log):
            with st.container(horizontal=True, vertical_alignment="center"):
                st.text(f"{change['made_at']:%d %b %H:%M} · {change['made_by']} · {_action(change)}", width="stretch")
                if change["undone"]:
                    st.caption("undone", width="content")
                else:
                    st.button(
                        "Undo",
                        key=f"undo-{change['event_id']}",
                        type="tertiary",
                        on_click=_undo,
                        args=(int(change["event_id"]),),
                        help=f"Undo change {change['event_id']}",
                    )


def _action(change: Mapping[str, Any]) -> str:
    note = f" ({change['note']})" if change["note"] else ""
    return f"{change['action']} {counted(change['n_texts'], 'text')}, {change['how']}{note}"


def _undo(event_id: int) -> None:
    try:
        undo_change(current_audit(), event_id)
    except AuditError as error:
        st.session_state["row_problem"] = str(error)


def undo_change(audit: Audit, event_id: int) -> None:
    """Undo a change of flags; what came of it is said when the page is drawn.

    Raises:
        AuditError: there is no such change, or it cannot be undone.
    """
    change = audit.flags.undo(event_id, person())
    left = f"; {change.left_alone:,} changed since, left alone" if change.left_alone else ""
    st.session_state["said"] = f"Undone for {counted(change.n_texts, 'text')}{left}"


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def watch_others() -> None:
    """Show the page anew when somebody else has changed flags."""
    latest, by = current_audit().flags.latest()
    if st.session_state.get("flags-drawn", latest) != latest:
        st.session_state["flags-drawn"] = latest
        st.toast(f"Flags have changed ({by})")
        st.rerun(scope="app")


def flags_drawn() -> None:
    """Remember up to which change the page shows the flags; to be called before it is drawn."""
    st.session_state["flags-drawn"] = current_audit().flags.latest()[0]
