"""Flagging many rows at once, the log of changes, and undoing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from concept_audit import Audit, AuditError, InfluenceOptions, RowFilter
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.tables import records

LOG_SHOWN = 12
SHOWN, SHOWN_CHARACTERS = 5, 90
"""Of the rows that would be flagged: how many are shown, and how much of each."""
SECONDS_BETWEEN_LOOKS = 3.0
CHOICES = {"all": "All that pass the filter", "top": "The first", "above": "Scores of at least"}
ACTIONS = {"remove": "Flag to remove", "review": "Flag to review", "keep": "Keep", None: "Take flags off"}
PAIR_ACTIONS = {
    "remove": "Flag to remove",
    "review": "Flag to review",
    "keep": "Keep",
    "swap": "Flag to swap",
    None: "Take flags off",
}
"""Of preference pairs."""
DONE = {
    "remove": "flagged to remove",
    "review": "flagged to review",
    "keep": "kept",
    "swap": "flagged to swap",
    None: "no longer flagged",
}


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


def bulk_flags(view: View) -> None:
    """A button to flag many rows: it asks which, and says how many they are."""
    if not read_only() and st.button(
        "Flag many", icon=":material/checklist:", disabled=not view.total, key="bulk", type="secondary"
    ):
        _choose_many(view)


@st.dialog("Flag many rows")
def _choose_many(view: View) -> None:
    audit = current_audit()
    start = list(CHOICES).index("top" if view.threshold is None else "above")
    how = st.radio("Rows", list(CHOICES), start, format_func=CHOICES.get, key="bulk-how", horizontal=True)
    top, where = None, view.where
    if how == "top":
        top = int(st.number_input("How many", 1, max(view.total, 1), min(20, view.total), key="bulk-top"))
    elif how == "above":
        least = st.number_input("Score", value=float(view.threshold or 0.0), format="%.4g", key="bulk-least")
        ceiling = where.scores[1] if where.scores else float("inf")
        floor = max(least, where.scores[0]) if where.scores else least
        where = replace(where, scores=(floor, ceiling))
    wanted = (view.concept, view.method)
    count = audit.rows.count(where, *wanted, view.options)
    count = count if top is None else min(count, top)
    flagged = replace(where, flag="any")
    already = "" if top else f", {audit.rows.count(flagged, *wanted, view.options):,} flagged already"
    st.markdown(f"**{counted(count, 'row')}** on all pages{already}")
    for row in records(audit.rank(*wanted, min(count, SHOWN), where, options=view.options)) if count else ():
        words = " ".join(f"{row['prompt']} {row['response']}".split())
        st.text(f"#{row['rank']:,}  {words[:SHOWN_CHARACTERS]}{'…' if len(words) > SHOWN_CHARACTERS else ''}")
    if count > SHOWN:
        st.caption(f"and {count - SHOWN:,} more")
    st.text_input("Note", key="bulk-note", placeholder="why (may be empty)", max_chars=200)
    with st.container(horizontal=True):
        for name, label in (PAIR_ACTIONS if audit.manifest.pair else ACTIONS).items():
            if st.button(
                f"{label}: {count:,}",
                key=f"bulk-{name}",
                disabled=not count,
                type="primary" if name == "remove" else "secondary",
            ):
                _flag_many(view, where, name, top, CHOICES[how])
                st.rerun()


def _flag_many(view: View, where: RowFilter, flag: str | None, top: int | None, chosen: str) -> None:
    audit = current_audit()
    how = f"{chosen.lower()}{f' {top:,}' if top else ''} by {view.method} of {view.concept}"
    try:
        change = audit.flags.set_matching(
            where,
            flag,
            view.concept,
            view.method,
            st.session_state.get("bulk-note", ""),
            person(),
            view.options,
            top,
            how,
        )
    except AuditError as error:
        st.session_state["row_problem"] = str(error)
        return
    st.session_state["said"] = (
        f"{counted(change.n_texts, 'text')} {DONE[flag]}"
        if change.event_id
        else "Nothing to change: they are so already"
    )


VERDICTS = ("remove", "review", "swap", "keep")


def verdicts_in_words(view: View, everything: int) -> str:
    """How many rows pass, and what has been decided about them: "14 of 439 rows · 3 remove · 10 unseen"."""
    found = current_audit().flags.verdicts(view.where, view.concept, view.method, view.options)
    first = (
        counted(view.total, "row") if view.total == everything else f"{view.total:,} of {counted(everything, 'row')}"
    )
    known = [f"{found[flag]:,} {flag}" for flag in VERDICTS if flag in found]
    others = sum(count for flag, count in found.items() if flag is not None and flag not in VERDICTS)
    parts = [first, *known, *([f"{others:,} other"] if others else []), f"{found.get(None, 0):,} unseen"]
    return " · ".join(parts)


def undo_button(audit: Audit) -> None:
    """Undo the visitor's latest change that is not undone yet; printed with its key."""
    if read_only():
        return
    message = st.session_state.pop("said", None)
    if message:
        st.toast(message)
    mine = audit.flags.undoable(person())
    last = next(iter(records(mine)), None)
    st.button(
        "Undo",
        icon=":material/undo:",
        key="undo",
        disabled=last is None,
        on_click=_undo,
        args=(None if last is None else int(last["event_id"]),),
        help="Nothing to undo" if last is None else f"Undo: {plain(_action(last))}",
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
